"""``torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options``: made by MindSpeed, ignored by gloo."""

import types

_distributed_c10d = types.SimpleNamespace(
    ProcessGroupHCCL=type("ProcessGroupHCCL", (), {"Options": type("Options", (), {})})
)
