"""Pages of figures in a real browser: every figure drawn, no network, dark and light, as narrow as a phone."""

import pytest

from mindspeed_simpo.studies.page import Section, table, write_page
from tests.browser import open_browser, open_page

go = pytest.importorskip("plotly.graph_objects")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "index.html"
    figures = [go.Figure(go.Histogram(x=[1, 2, 2, 3])), go.Figure(go.Scatter(x=[0, 1], y=[2, 1], name="</script>"))]
    sections = [Section(f"Figure {n}", "Higher is better.", figure) for n, figure in enumerate(figures)]
    sections.append(Section("Numbers", "One row each.", body=table(["name", "value"], [["<b>", 0.5], ["n", 3]])))
    write_page(path, "A & B", sections, "<p>Summary.</p>")
    return path


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 375)])
def test_a_page_draws_every_figure(page_file, scheme, width):
    with open_browser() as browser, open_page(browser, page_file.as_uri(), width=width, scheme=scheme) as page:
        page.wait_for_function("document.querySelectorAll('.figure[data-drawn]').length == 2")
        assert page.title() == page.locator("h1").inner_text() == "A & B"
        assert page.locator(".figure .plot-container .trace, .figure .bars .point").count() > 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ink = page.evaluate("getComputedStyle(document.querySelector('.figure .xtick text')).fill")
        assert ink == {"light": "rgb(29, 35, 48)", "dark": "rgb(228, 232, 239)"}[scheme]
        assert page.locator("td").first.inner_text() == "<b>"
