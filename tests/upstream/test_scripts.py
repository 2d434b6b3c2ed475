"""Every flag of the launch scripts, through MindSpeed-LLM's own parser and validation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tokenizers import make_tokenizer
from tests.unit.test_ascend_scripts import PLUG_IN, call
from tests.upstream.harness import environment, needs_upstream

pytestmark = needs_upstream

PROGRAM = """
import json, sys
sys.argv[1:] = json.loads(sys.argv[1])
from mindspeed_simpo.integrations.mindspeed_llm import hooks
hooks.install()
from mindspeed_llm import megatron_adaptor
from megatron.training import initialize
args = initialize.parse_args(None, False)
initialize.validate_args(args, {})
print("STAGE", args.stage, args.data_parallel_size)
"""


def parsed(flags, ranks):
    """What PROGRAM says of these flags on the first of so many ranks."""
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(flags)],
        cwd=os.environ["MINDSPEED_LLM_PATH"],
        env=environment() | {"RANK": "0", "WORLD_SIZE": str(ranks)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout[process.stdout.index("STAGE") :]


@pytest.mark.parametrize("script", PLUG_IN)
def test_every_flag_is_upstreams_or_ours(tmp_path, script):
    make_tokenizer("llama").save_pretrained(tmp_path / "tokenizer")
    work = tmp_path / "work"
    work.mkdir()
    # the script makes a folder logs/ in the root, and the record lands beside it
    (work / "root").symlink_to(Path(os.environ["MINDSPEED_LLM_PATH"]).resolve())
    _, recorded = call(script, work / "root", TOKENIZER_PATH=str(tmp_path / "tokenizer"))
    start = recorded["flags"].index("-m") + 2
    nodes = int(recorded["flags"][recorded["flags"].index("--nnodes") + 1])
    assert parsed(recorded["flags"][start:], 8 * nodes).startswith("STAGE simpo")
