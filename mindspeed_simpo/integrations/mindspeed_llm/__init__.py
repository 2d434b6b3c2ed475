"""SimPO, and DPO made exact, inside an installed MindSpeed-LLM: two features, one patch, one wrapped function."""
