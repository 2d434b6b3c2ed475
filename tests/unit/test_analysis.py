"""The numbers of an analysis by hand, the text of tokens, and the page as a browser opens it."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest

from mindspeed_simpo.studies.analysis import history, statistics, texts
from mindspeed_simpo.studies.analysis.scores import Piece
from tests.browser import open_browser, open_page

pytest.importorskip("plotly", reason="plotly is not installed")
from scripts.measure_page import DRAWN, SHOWN, SOURCES, made_up_analysis, open_seconds

MARKS = ".barlayer .point, .scatterlayer .js-line, .heatmaplayer image"


def test_equal_values_share_the_mean_of_their_ranks():
    assert statistics.average_ranks(np.array([3.0, 1.0, 3.0, 2.0, 3.0])).tolist() == [4.0, 1.0, 4.0, 2.0, 4.0]


def test_spearman():
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5, squares 4.5 and 5
    first, second = np.array([1.0, 5.0, 5.0, 9.0]), np.array([0.1, 30.0, 20.0, 40.0])
    assert statistics.spearman(first, second) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert statistics.spearman(first, np.exp(first)) == pytest.approx(1)
    assert statistics.spearman(first, -first) == pytest.approx(-1)
    assert statistics.spearman(first, np.ones(4)) is None
    assert statistics.spearman(first[:1], second[:1]) is None


def test_wilson_interval():
    # Wilson's interval of 8 of 10: (0.8 + 0.19207 +- 1.95996 sqrt(0.016 + 0.0096036)) / 1.384146
    found = statistics.accuracy(np.array([True] * 8 + [False] * 2))
    assert (found["right"], found["pairs"], found["accuracy"]) == (8, 10, 0.8)
    assert found["interval"] == pytest.approx([0.490162, 0.943318], abs=1e-6)
    assert statistics.accuracy(np.array([True] * 3))["interval"] == pytest.approx([0.438503, 1.0], abs=1e-6)
    assert statistics.accuracy(np.zeros(0, bool)) == {"pairs": 0, "right": 0, "accuracy": None, "interval": None}


def test_groups_by_length_difference_have_every_pair_once():
    difference = np.array([*range(-40, 41), 0, 0, 0, 900], float)
    right = difference > 0
    groups = statistics.accuracy_by_length(right, difference)
    assert len(groups) == 10
    assert sum(group["pairs"] for group in groups) == len(difference)
    assert all(one["to"] < other["from"] for one, other in pairwise(groups))
    assert (groups[0]["from"], groups[-1]["to"]) == (-40, 900)
    assert (groups[0]["accuracy"], groups[-1]["accuracy"]) == (0, 1)
    # every pair as long: one group
    [group] = statistics.accuracy_by_length(np.ones(50, bool), np.zeros(50))
    assert (group["from"], group["to"], group["pairs"]) == (0, 0, 50)


def test_sources_without_pairs():
    found = statistics.accuracy_by_source(np.array([True, False]), np.array([2, 2]), ["a", "b", "c"])
    assert [(group["source"], group["pairs"], group["accuracy"]) for group in found] == [
        ("a", 0, None),
        ("b", 0, None),
        ("c", 2, 0.5),
    ]


def test_contingency():
    right, likelier = np.array([1, 1, 1, 0, 0, 0], bool), np.array([1, 1, 0, 1, 0, 0], bool)
    assert statistics.contingency(right, likelier) == {
        "both_right": 2,
        "reward_right_only": 1,
        "likelihood_right_only": 1,
        "both_wrong": 2,
        "disagreement": pytest.approx(1 / 3),
    }


@pytest.mark.parametrize("values", [np.zeros(5), np.array([1e9]), np.arange(3.0), np.r_[np.zeros(999), 1e6]])
def test_a_histogram_holds_every_value(values):
    found = statistics.distribution(values)
    assert sum(found["histogram"]["counts"]) == len(values)
    assert len(found["histogram"]["edges"]) == len(found["histogram"]["counts"]) + 1
    assert found["mean"] == pytest.approx(values.mean())


def test_extremes():
    margin = np.array([0.5, -2.0, 3.0, 0.0, 1.0])
    assert statistics.extremes(margin, 2) == ([1, 3], [2, 4])
    assert statistics.extremes(margin, 10) == ([1, 3], [2, 4])  # no pair is shown twice
    assert statistics.extremes(margin[:1], 10) == ([0], [])
    assert statistics.extremes(margin, 0) == ([], [])


def test_displacement_of_a_killed_run(tmp_path):
    lines = [
        {"step": 0, "split": "eval", "logps/chosen": -2.0, "logps/rejected": -2.5},
        {"step": 1, "split": "train", "logps/chosen": None, "logps/rejected": -2.5},
        {"step": 1, "split": "alarm", "alarm": "loss", "message": "."},
        {"step": 4, "split": "eval", "logps/chosen": -2.25, "logps/rejected": -3.5},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 5, "spl', encoding="utf-8")
    found = history.displacement(history.read_metrics(path))
    assert list(found) == ["eval"]
    assert found["eval"]["step"] == [0, 4]
    assert (found["eval"]["chosen_change"], found["eval"]["rejected_change"]) == ([0, -0.25], [0, -1.0])
    assert history.displacement(history.read_metrics(tmp_path / "absent")) == {}


def test_a_character_of_several_tokens_is_one_piece():
    # one token a byte
    text = "né 語🙂 \ufffd!"
    ids = list(text.encode())

    def decode(some):
        return bytes(some).decode(errors="replace")

    logprobs = [-float(number) for number in range(len(ids))]
    pieces = texts.pieces_of(decode, ids, logprobs)
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.text for piece in pieces[:5]] == ["n", "é", " ", "語", "🙂"]
    assert [value for piece in pieces for value in piece.logprobs] == logprobs
    assert pieces[1].logprobs == (-1.0, -2.0)
    # half a character at the end, and a token that is not scored
    pieces = texts.pieces_of(decode, "é".encode()[:1] + b"a" + "é".encode()[:1], [None, -1.0, -2.0])
    assert pieces == [Piece("\ufffd", ()), Piece("a", (-1.0,)), Piece("\ufffd", (-2.0,))]
    # tokens that each end within the next character
    tokens = [text.encode() for text in "涨落"]
    tokens = [tokens[0][:1], tokens[0][1:] + tokens[1][:1], tokens[1][1:2], tokens[1][2:]] * 3

    def decode_tokens(numbers):
        return b"".join(tokens[number] for number in numbers).decode(errors="replace")

    pieces = texts.pieces_of(decode_tokens, range(12), [-1.0] * 12)
    assert [piece.text for piece in pieces] == ["涨落"] * 3


def test_text_of_data_is_escaped():
    pieces = [Piece("<script>", (-0.1,)), Piece("tool </i> &", ()), Piece("\n", (-9.9,))]
    markup = texts.coloured(pieces)
    assert '<i class="l0" title="-0.10">&lt;script&gt;</i>' in markup
    assert "<u>tool &lt;/i&gt; &amp;</u>" in markup
    assert '<i class="l5 n" title="-9.90">\n</i>' in markup
    assert texts.without_repeats("a" + "<|image_pad|>" * 256 + "b") == "a<|image_pad|> ×256b"


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    return made_up_analysis(tmp_path_factory.mktemp("analysis"))


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


def test_a_page_of_10000_pairs_opens_in_three_seconds(browser, made_up):
    _, work = open_seconds(browser, made_up)  # what it takes where nothing else runs
    assert 0.1 < work < 3


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 375)])
def test_every_figure_is_drawn(browser, made_up, scheme, width):
    with open_page(browser, made_up.as_uri(), width=width, scheme=scheme) as page:
        page.wait_for_function(DRAWN)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # something in the plot, and the plot inside of the page
        marks = page.evaluate(
            """marks => [...document.querySelectorAll('.figure')].map(figure => {
                const box = figure.querySelector('svg.main-svg').getBoundingClientRect();
                return [figure.querySelectorAll(marks).length, box.left, box.right, box.height]; })""",
            MARKS,
        )
        assert len(marks) == 13
        assert all(
            number > 0 and left >= 0 and right <= width and height > 100 for number, left, right, height in marks
        )
        reading = page.locator("section .reading").all_inner_texts()
        assert len(reading) == page.locator("section h2").count() == 10
        assert all(text.endswith(".") and text.count(". ") == 0 and len(text) > 60 for text in reading)
        for source in SOURCES:
            assert page.get_by_text(source).count() > 0
        pairs = page.locator("details.pair")
        assert pairs.count() == 2 * SHOWN
        pairs.nth(1).locator("summary").click()
        token = pairs.nth(1).locator(".tokens i.l5").first
        assert token.is_visible()
        assert math.exp(float(token.get_attribute("title"))) < 1e-4
        assert token.evaluate("it => getComputedStyle(it).backgroundColor") != "rgba(0, 0, 0, 0)"
        # the text of the data is text
        assert page.locator(".tokens b").count() == 0
        assert page.get_by_text("<b>").count() > 0
        # its colours follow the reader
        bar = page.locator(".figure .barlayer .point path").first
        before = bar.evaluate("it => getComputedStyle(it).fill")
        page.emulate_media(color_scheme={"light": "dark", "dark": "light"}[scheme])
        page.wait_for_function(
            "before => getComputedStyle(document.querySelector('.figure .barlayer .point path')).fill != before",
            arg=before,
        )
