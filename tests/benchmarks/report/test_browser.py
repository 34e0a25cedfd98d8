"""The page in a browser, from a file: 504 questions, three budgets, two methods."""

import itertools

import pytest

from vlm_prune.benchmarks.report import write_report_page
from vlm_prune.benchmarks.tasks import TASKS, VISUAL

DARK = "rgb(22, 24, 27)"


@pytest.fixture(scope="module")
def address(make_run, edit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for budget in (32, 64, 128):
        answered = {"prediction": "yes", "score": 1.0} if budget == 128 else {}
        for method, accuracy in (("fopru", 0.86), ("random", 0.8)):
            accuracy += budget / 1000

            def right(task, index, accuracy=accuracy):
                if index < 10:  # has a picture
                    return index % 2 == 0
                return task != "exist" or index < round(84 * accuracy)

            run = make_run(
                folder / f"{method}-{budget}", method, budget, per_task=84, right=right, **answered
            )

            def change(results, accuracy=accuracy):
                results["overall"]["accuracy"] = accuracy

            edit(run / "results.json", change)
    return write_report_page([folder])[0].as_uri()


@pytest.fixture(scope="module")
def errors():
    return []


@pytest.fixture(scope="module")
def tab(browser, errors):
    page = browser.new_page()
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "request", lambda request: None if is_local(request.url) else errors.append(request.url)
    )
    return page


def is_local(url):
    return url.startswith(("file:", "data:"))


@pytest.fixture
def page(tab, address, errors):
    tab.set_viewport_size({"width": 1100, "height": 800})
    tab.emulate_media(color_scheme="light")
    tab.goto(address)
    yield tab
    assert errors == []


def cells(page, column):
    return page.eval_on_selector_all(
        f"#table tbody tr:not([hidden]) > :nth-child({column})", "all => all.map(c => c.innerText)"
    )


def test_it_loads_within_two_seconds_of_work(page, address):
    client = page.context.new_cdp_session(page)
    client.send("Performance.enable", {"timeDomain": "threadTicks"})

    def busy():
        metrics = client.send("Performance.getMetrics")["metrics"]
        return next(m["value"] for m in metrics if m["name"] == "TaskDuration")

    before = busy()
    page.goto(address)
    page.wait_for_selector("#cards article")
    work = busy() - before
    wall = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1e3
    print(f"\nload: {work:.2f} s of work, {wall:.2f} s on the clock")
    assert 0 < work < 2
    assert page.locator("#cards article").count() == 12


def test_front_and_intervals_are_drawn(page):
    front = page.locator(".plot.wide path.front").bounding_box()
    assert front["width"] > 200 and front["height"] > 50
    assert page.locator(".plot.wide .interval").count() == 6
    said = page.locator("#front-wide").inner_html()
    assert all(f"fopru, budget {n} with {n}.0 tokens" in said for n in (32, 64, 128))
    assert "random" not in said  # never on the front


def test_bars_of_time_are_stacked(page):
    bars = page.eval_on_selector_all(
        "table.times:not([hidden]) .bar",
        """all => all.map(bar => [...bar.children].map(phase => {
          const box = phase.getBoundingClientRect();
          return [phase.className, Math.round(box.left), Math.round(box.right)];
        }))""",
    )
    assert [[phase for phase, _, _ in bar] for bar in bars] == [
        ["vision", "prefill", "decode"], *[["vision", "selection", "prefill", "decode"]] * 2,
    ]  # fmt: skip
    for bar in bars:
        for (_, left, right), (_, following, _) in itertools.pairwise(bar):
            assert left < right and abs(right - following) <= 1


def test_a_card_and_how_it_was_made(page):
    card = page.locator("#cards article").first
    sample = TASKS[VISUAL[0]].sample(1)  # questions that pruning broke come first
    gold = sample.answer
    assert card.locator("h3").inner_text() == sample.turns[-1].text
    assert card.locator(".facts").inner_text().split("\n")[:2] == [
        f"gold {gold}",
        f"unpruned {gold}",
    ]
    assert "wrong" in card.locator("[data-method=fopru] figcaption b").inner_text()
    assert page.locator("#made pre").all_inner_texts() == [
        "vlm-prune eval fopru", "vlm-prune eval random",
    ]  # fmt: skip
    assert page.locator("#made dl div", has_text="vlm-prune").inner_text().endswith("0.1.0")


def test_columns_sort_both_ways(page):
    header = page.locator("#table th", has_text="exist")
    header.locator("button").click()
    down = [float(text) for text in cells(page, 4)]
    assert down == sorted(down, reverse=True) and len(set(down)) > 3
    assert header.get_attribute("aria-sort") == "descending"
    header.locator("button").press("Enter")
    assert [float(text) for text in cells(page, 4)] == down[::-1]
    assert page.locator("#table [aria-sort]").count() == 1


def test_rows_are_filtered_by_text_and_budget(page):
    page.fill("#filter", "rand")
    assert cells(page, 1) == ["random"] * 3
    page.select_option("#filter-budget", "64")
    assert cells(page, 2) == ["64"] and page.inner_text("#rows") == "1 of 7 rows"
    page.select_option("#cells", "share")
    assert cells(page, 4) == ["50.0 [40.0, 60.0]"]


def kept(page, method):
    """Patches that the first question's picture of a method leaves clear."""
    return page.evaluate(
        """name => {
          const canvas = document.querySelector(`#cards [data-method=${name}] canvas`);
          const { data } = canvas.getContext("2d").getImageData(0, 0, 24, 24);
          return data.filter((value, place) => place % 4 === 3 && value === 0).length;
        }""",
        method,
    )


def test_slider_moves_all_budgets_by_keyboard(page):
    slider = page.locator("#gallery-budget")
    assert kept(page, "fopru") == 32
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert kept(page, "fopru") == 64 and slider.get_attribute("aria-valuetext") == "64 tokens"
    page.keyboard.press("End")
    assert kept(page, "random") == 128
    assert page.locator("#time-budget").input_value() == "2"
    assert page.locator("table.times:visible thead").inner_text().startswith("128 tokens")


def test_only_what_pruning_broke(page):
    page.select_option("#outcome", "broken")
    assert page.inner_text("#shown") == "44 of 60 questions"
    assert page.locator("#cards [data-method=fopru] figcaption", has_text="wrong").count() == 12
    page.click("#more")
    assert page.locator("#cards article").count() == 24
    page.select_option("#task", "ocr")
    assert page.inner_text("#shown") == "5 of 60 questions"
    page.locator("#gallery-budget").press("End")
    assert page.inner_text("#shown") == "0 of 60 questions"


def test_pictures_have_descriptions(page):
    descriptions = page.eval_on_selector_all("img", "all => all.map(image => image.alt)")
    assert len(descriptions) == 36 and len(set(descriptions)) == 36
    page.select_option("#method", label="random")
    assert page.locator("#cards article:first-child img").count() == 2


def test_everything_is_reached_by_keyboard(page):
    reached = []
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    wanted = {
        "time-budget",
        "filter",
        "filter-budget",
        "cells",
        "gallery-budget",
        "outcome",
        "more",
    }
    assert wanted <= set(reached)


def test_legend_highlights_one_method(page):
    page.locator("[data-highlight='1']").press("Enter")
    page.locator("#filter").focus()
    dim = page.eval_on_selector_all(".wide .dim", "all => all.map(series => series.dataset.series)")
    assert dim == ["0"]


def test_dark_mode_changes_the_paper(page):
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) != DARK
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(paper) == DARK


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_needs_no_sideways_scrolling(page, width):
    page.set_viewport_size({"width": width, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator(".plot:visible").count() == 1
    assert page.locator(".plot.narrow").is_visible()


def test_a_video_is_a_sheet_of_frames(make_run, tab, errors, tmp_path):
    video = {"video_grids": [[16, 2, 3]], "grids": [None], "image_tokens": [97], "kept": [[0, 13]]}
    run = make_run(tmp_path, tasks=("appears",), per_task=1, cropped=False, **video)
    tab.goto(write_report_page([run])[0].as_uri())
    sheets = tab.locator("figure .frames")
    assert sheets.count() == 2  # unpruned and pruned
    for number, veiled in enumerate((0, 16)):
        sheet = sheets.nth(number)
        assert sheet.locator("img").count() == 16
        assert sheet.locator("canvas").count() == veiled
    first, fifth = (sheets.nth(1).locator("img").nth(n).bounding_box() for n in (0, 4))
    assert first["x"] == fifth["x"] and first["y"] < fifth["y"]
    assert errors == []
