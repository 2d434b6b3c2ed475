"""The objectives of this package inside an installed MindSpeed-LLM: two features, one patch, one wrapped function."""
