"""The plug-in for an installed MindSpeed-LLM: two features of MindSpeed, one patch, one wrapped function."""
