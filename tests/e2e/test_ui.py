"""The page in a real browser, through a whole run of the quickstart; its server, asked without a browser."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from tests.browser import open_browser, open_page
from tests.e2e.cli import lines_of

pytest.importorskip("gradio")

REPO = Path(__file__).parents[2]
RUN = "outputs/quickstart"
pytestmark = pytest.mark.newest_core


class Server:
    """``mindspeed-simpo ui`` as a user starts it, on a free port."""

    def __init__(self, root):
        self.root = root
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mindspeed_simpo", "ui", "--root", str(self.root), "--port", "0"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(self.root.parent), "GRADIO_ALLOWED_PATHS": "/"},
        )
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), self.url

    def end(self):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.stdout.close()

    def ask(self, path, body=None, **headers):
        """Status and text of an answer."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            names = {"content-type": "application/json"} | names
        request = urllib.request.Request(self.url + path, data, names)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def call(self, action, data):
        """Call a function of the page as the page does; its outputs."""
        config = json.loads(self.ask("/config")[1])
        [number] = [part["id"] for part in config["dependencies"] if part["api_name"] == action]
        body = {"data": data, "fn_index": number, "session_hash": f"s{number}"}
        status, _ = self.ask("/gradio_api/queue/join", body)
        assert status == 200
        with urllib.request.urlopen(f"{self.url}/gradio_api/queue/data?session_hash=s{number}", timeout=30) as stream:
            for line in stream:
                message = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: ") else {}
                if message.get("msg") == "process_completed":
                    return message["output"]["data"]
        raise AssertionError("no answer")


@pytest.fixture
def server(tmp_path):
    root = tmp_path / "root"
    (root / "configs").mkdir(parents=True)
    shutil.copytree(REPO / "configs" / "quickstart", root / "configs" / "quickstart")
    shutil.copy(REPO / "configs" / "quickstart.yaml", root / "configs")
    server = Server(root)
    yield server
    server.end()
    for record in root.rglob("ui/run.json"):  # a failed test leaves no run behind
        facts = json.loads(record.read_text())
        if facts["exit_code"] is None:
            os.killpg(facts["process"], signal.SIGKILL)


def state(page, *states, timeout=90):
    page.wait_for_selector(", ".join(f"#state [data-state={name}]" for name in states), timeout=timeout * 1000)


def fill(page, group, **keys):
    if not page.locator(f"#{group} textarea").first.is_visible():
        page.locator(f"#{group} > button").click()
    for key, value in keys.items():
        page.locator(f"#key-{key}").locator("textarea, input").first.fill(str(value))


def test_the_quickstart_in_a_browser(server):
    output = server.root / RUN
    with open_browser() as browser:
        with open_page(browser, server.url) as page:
            page.locator("#source input").fill("configs/quickstart.yaml")
            page.keyboard.press("Enter")
            page.locator("#load").click()
            page.wait_for_selector("#verdict .good")
            # the keys of the chosen objective only
            assert not page.locator("#key-dpo_beta").is_visible()
            page.locator("#key-stage input").click()
            page.get_by_role("option", name="dpo", exact=True).click()
            page.locator("#key-dpo_beta textarea").wait_for()
            assert not page.locator("#key-simpo_beta").is_visible()
            page.locator("#key-stage input").click()
            page.get_by_role("option", name="simpo", exact=True).click()
            page.locator("#key-simpo_beta textarea").wait_for()
            # an error at once, then a form that is right
            fill(page, "TrainingOptions", train_iters=40, lr="fast")
            page.wait_for_selector("#verdict .bad >> text=`lr`: input should be a valid number")
            fill(page, "TrainingOptions", lr="2e-3")
            fill(page, "OutputOptions", log_interval=1, eval_interval=20)
            fill(page, "WatchOptions", eval_generate=2, eval_generate_max_new_tokens=12)
            page.locator("#ranks input").fill("2")
            flags = "--train-iters 40 --log-interval 1 --eval-interval 20 --eval-generate 2"
            page.wait_for_selector(f"#words >> text={flags}")
            page.locator("#check").click()
            page.wait_for_selector("#answer .notice.good >> text=ready to train", timeout=90_000)
            assert "540" in page.locator("#answer .terminal").inner_text()

            page.locator("#start").click()
            state(page, "running", timeout=30)
            curve = ".curve:first-child .scatterlayer .trace"
            page.wait_for_selector(curve, timeout=90_000)
            page.locator("#stop").click()
            state(page, "stopped")
        record = json.loads((output / "ui" / "run.json").read_text())
        assert (record["exit_code"], record["ranks"]) == (143, 2)
        written = yaml.safe_load((output / "ui" / "config.yaml").read_text())
        assert written["train_iters"] == 40
        assert "seed" not in written  # its default

        with open_page(browser, server.url) as page:  # another tab finds the run
            page.get_by_role("tab", name="Runs").click()
            state(page, "stopped")
            page.locator("#resume").click()
            state(page, "running", timeout=30)
        server.end()  # the run goes on, and the next start of the page finds it
        server.start()
        with open_page(browser, server.url, width=390, scheme="dark") as page:
            page.get_by_role("tab", name="Runs").click()
            state(page, "running", "finished", timeout=30)
            state(page, "finished")
            page.wait_for_selector("#samples td >> nth=0", timeout=20_000)
            lines = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
            newest = [line for line in lines if line["step"] == 40]
            assert len(newest) == 2
            shown = page.locator("#samples").inner_text()
            for line in newest:
                assert " ".join(line["answer"].split()) in " ".join(shown.split())
            page.wait_for_selector(curve)
            page.locator("#edit").click()
            page.wait_for_selector("#words >> text=--nproc-per-node")
            assert page.locator("#yaml").inner_text().count("train_iters: 40") == 1
            for part in ("#load", "#start", "#yaml", "#TrainingOptions", "#key-simpo_beta textarea"):
                box = page.locator(part).bounding_box()
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= 390, part
    assert [line["step"] for line in lines_of(output)] == list(range(1, 41))


def test_the_server_without_a_browser(server):
    """Everything is judged where it is done: the functions of the page answer without the page."""
    assert server.ask("/")[0] == 200
    for path in ("/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/file=configs/quickstart.yaml"):
        status, text = server.ask(path)
        assert status in (403, 404)
        assert "root:" not in text
    assert server.ask("/", Host="rebound.example")[0] == 403
    body = {"data": [], "fn_index": 0, "session_hash": "x"}
    assert server.ask("/gradio_api/queue/join", body, Origin="https://evil.example")[0] == 403
    assert server.ask("/gradio_api/queue/join", body, Origin="null", content_type="text/plain")[0] == 403
    assert server.ask("/gradio_api/upload", {})[0] == 403

    from mindspeed_simpo.studies.ui import form

    good = {"model_name_or_path": "configs/quickstart", "data_path": "configs/quickstart/train.jsonl", "device": "cpu"}
    outside = server.root.parent / "outside"
    for attack in ({"output_dir": str(outside)}, {"data_path": "/etc/passwd"}, {"load": "../x"}):
        entries = form.entries_of(good | {"init_from": "config"} | attack)
        said = server.call("start", [1, None, "", *entries])
        assert "lies outside of the root folder" in str(said)
    assert not outside.exists()
    assert not (server.root / "outputs").exists()
    assert "root:" not in str(server.call("load", ["/etc/passwd", 1]))

    port = server.url.rpartition(":")[2]
    command = [sys.executable, "-m", "mindspeed_simpo", "ui", "--root", str(server.root), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --port: cannot listen on 127.0.0.1:{port}")
