"""Pages as they are seen: on a phone, on a desk, on paper, by keyboard and by ear."""

from __future__ import annotations

import pytest

from tests.html import examples

PAGES = ("compare", "show", "evaluation", "profile")
A4 = 1040  # pixels across: 297 mm less the margins
MANY = tuple(f"streaming_llm(sink={sink})@0.{share}" for sink in (4, 8) for share in (1, 2, 4))


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return examples.pages()


def open_all(page):
    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_no_wider_than_its_window(visit, pages, name, width):
    page = visit(pages[name], width)
    open_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("name", ["compare", "evaluation", "profile"])
def test_a_narrow_table_scrolls_in_itself_and_says_so(visit, pages, name):
    page = visit(pages[name], 390)
    assert page.locator(".hint").first.is_visible()
    region = page.locator(".wide").first
    assert region.get_attribute("tabindex") == "0"
    assert region.get_attribute("aria-label")
    region.evaluate("(one) => one.scrollTo(9999, 0)")
    last = region.locator("thead th").last.bounding_box()
    assert last["x"] + last["width"] <= 390
    first = region.locator("tbody th").first.bounding_box()
    assert first["x"] >= 0


@pytest.mark.parametrize("name", ["compare", "evaluation", "profile"])
def test_every_column_is_there_at_1280_and_on_paper(visit, pages, name):
    for width, media in ((1280, "screen"), (A4, "print")):
        page = visit(pages[name], width)
        page.emulate_media(media=media)
        open_all(page)
        edges = page.locator("table tr > *").evaluate_all(
            "(cells) => cells.map((cell) => cell.getBoundingClientRect().right)"
        )
        assert max(edges) <= width
        hidden = page.locator(".wide").evaluate_all(
            "(all) => all.filter((one) => one.scrollWidth > one.clientWidth + 1).length"
        )
        assert hidden == 0


def test_paper_shows_closed_sections_and_no_controls(visit, pages):
    page = visit(pages["evaluation"], A4)
    page.emulate_media(media="print")
    assert page.locator("#part-1 table").first.is_visible()
    for control in (".filter", "nav", "#open", ".hint >> nth=0"):
        assert not page.locator(control).is_visible()


@pytest.mark.parametrize("name", PAGES)
def test_every_picture_has_a_name(visit, pages, name):
    page = visit(pages[name])
    pictures = page.locator("svg:not(svg svg), img")
    assert pictures.count() > 0
    for picture in pictures.all():
        named = picture.get_attribute("aria-label") or picture.get_attribute("alt")
        assert named or picture.get_attribute("aria-hidden") == "true"
    for chart in page.locator("svg.chart").all():
        assert chart.get_attribute("role") == "img"
        assert "full" in chart.get_attribute("aria-label")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_text_stands_out_from_its_ground(visit, pages, name, scheme):
    """4.5 : 1, as WCAG AA asks, for every text on the ground that is painted under it."""
    page = visit(pages[name], color_scheme=scheme)
    open_all(page)
    assert page.evaluate(CONTRASTS) == []


@pytest.mark.parametrize("name", ["compare", "show"])
def test_a_map_is_read_with_the_keyboard(visit, pages, name):
    page = visit(pages[name])
    told = page.locator(".told").first
    page.focus(".map")
    steps = {
        "ArrowRight": "layer 0, head 0, token 1:",
        "ArrowDown": "layer 0, head 1, token 1:",
        "End": "layer 0, head 1, token 119:",
        "PageUp": "layer 0, head 1, token 107:",
        "Home": "layer 0, head 1, token 0:",
        "ArrowLeft": "layer 0, head 1, token 0:",
    }
    for key, words in steps.items():
        page.keyboard.press(key)
        assert told.inner_text().startswith(words)
    survivors = examples.results()[1].survivors
    kept = bool(survivors.kept[1, 0])
    assert f": {'kept' if kept else 'evicted'}, kept by {int(survivors.heads[0])} of 8" in (
        told.inner_text()
    )
    assert page.locator(".cross").first.is_visible()
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"


def test_a_map_is_read_with_the_mouse(visit, pages):
    page = visit(pages["compare"])
    page.locator(".map").first.hover(position={"x": 1, "y": 1})
    assert page.locator(".told").first.inner_text().startswith("layer 0, head 0, token 0:")


def test_filters_leave_the_full_cache_and_what_was_asked_for(visit, pages):
    page = visit(pages["evaluation"])
    shown = page.locator("#board tbody tr:visible th")
    everything = shown.all_inner_texts()
    assert len(everything) == len(examples.RECIPES)
    page.select_option("#budget", "0.2")
    assert sorted(shown.all_inner_texts()) == ["buzz@0.2", "full", "h2o(recent=20)@0.2"]
    page.fill("#text", "BUZ")
    assert sorted(shown.all_inner_texts()) == ["buzz@0.2", "full"]
    assert page.inner_text("#count") == "1 of 5 recipes"
    open_all(page)
    assert page.locator("#part-0 svg [data-recipe='tova@90']").first.is_hidden()
    assert page.locator("#part-0 tbody tr[data-recipe='none']").is_visible()
    page.select_option("#budget", "")
    page.fill("#text", "")
    assert shown.all_inner_texts() == everything


def test_a_heading_sorts(visit, pages):
    page = visit(pages["evaluation"])
    first = page.locator("#board tbody th").first
    kept = page.locator("#board thead button").nth(1)
    kept.click()
    assert first.inner_text() == "full"
    kept.click()
    assert first.inner_text() == "tova@90"
    assert page.locator("#board thead th").nth(1).get_attribute("aria-sort") == "ascending"


def test_items_are_unpacked_when_a_number_is_chosen(visit, pages):
    page = visit(pages["evaluation"])
    assert page.locator("#items-list tr").count() == 0
    page.locator("tr[data-recipe='buzz@0.2'] .opens").first.click()
    rows = page.locator("#items-list tbody tr")
    rows.first.wait_for()
    assert rows.count() == 8
    assert page.inner_text("#items-title").startswith(f"buzz@0.2: {examples.TASKS[0]}, agnostic")
    cells = rows.first.locator("th, td").all_inner_texts()
    row = next(row for row in examples.run().rows if row["recipe"] == "buzz@0.2")
    assert cells[0] == row["item"]
    assert float(cells[1]) == row["scores"]["exact"]
    assert "length 300" in cells[4]
    assert "an answer" in cells[5]
    page.keyboard.press("Escape")
    assert page.locator("#items").is_hidden()


def test_a_link_opens_its_section(visit, pages):
    page = visit(pages["evaluation"])
    assert page.locator("details[open]").count() == 0
    page.locator("nav a[href='#part-2']").click()
    assert page.locator("details[open]").get_attribute("id") == "part-2"
    assert visit(pages["evaluation"], fragment="#part-1").locator("#part-1[open]").count() == 1


def test_labels_of_a_plot_lie_apart_and_marks_are_in_the_legend(visit):
    page = visit(examples.evaluation_page(examples.run(("full", *MANY)), "kvhive"))
    open_all(page)
    for chart in page.locator("svg.chart").all():
        boxes = [label.bounding_box() for label in chart.locator(".name").all()]
        assert boxes
        for place, one in enumerate(boxes):
            for other in boxes[:place]:
                assert apart(one, other), chart.get_attribute("aria-label")
    for part in page.locator("details.part").all():
        seen, named = (
            set(part.locator(f"{where} .mark").evaluate_all(LOOKS))
            for where in (".chart", ".legend")
        )
        assert seen == named


def apart(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether two boxes share less than two pixels one way or the other."""
    return any(
        first[start] + first[size] <= second[start] + 2
        for start, size in (("x", "width"), ("y", "height"))
        for first, second in ((one, other), (other, one))
    )


LOOKS = "(all) => all.map((one) => getComputedStyle(one).fill + one.getAttribute('d'))"
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const over = ([r, g, b, a], under) =>
    [r, g, b].map((value, i) => (value * a + under[i] * (255 - a)) / 255);
  const light = (colour) => {
    const [r, g, b] = colour.map((value) => {
      const share = value / 255;
      return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    if (!element) return [255, 255, 255];
    return over(rgba(getComputedStyle(element).backgroundColor), ground(element.parentElement));
  };
  const faint = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility() || element.closest("script, title")) continue;
    const style = getComputedStyle(element);
    const colour = element.closest("svg") ? style.fill : style.color;
    const below = ground(element);
    const [a, b] = [light(over(rgba(colour), below)), light(below)].sort();
    if ((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5) {
      faint.push(`${element.tagName} ${element.className} ${element.textContent.slice(0, 30)}`);
    }
  }
  return faint;
}"""
