"""The console in a real browser: what an operator does with it, with a mouse, a keyboard or a phone."""

from __future__ import annotations

import math
import re
import time
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect
from sqlalchemy import text

from browsers import PATIENCE_MS, chromium, served
from builders import NOON_MS, add_row, row, rule_fired, statuses
from outbox.clock import now_ms
from outbox.storage.engines import writing
from outbox.web import create_app, looks

pytestmark = pytest.mark.slow

SECRET = "a-secret-of-the-tests"
PAGES = ("/", "/events", "/events/1", "/events/confirm?do=purge&scope=all", "/destinations", "/ledger")
SCRIPT = "<script>window.hacked = true</script><img src=x onerror='window.hacked = true'>"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def console(outbox):
    """The URL of a console that everybody may enter."""
    with served(create_app(outbox, may_enter=lambda environ: True)) as url:
        yield url


@pytest.fixture
def open_page(browser, console):
    """Return a page of a window with these settings. A message in its console fails the test."""
    contexts, said = [], []

    def open_page(path="/", url=console, **settings):
        context = browser.new_context(**settings)
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture
def rows(outbox):
    """Of each kind one, with everything that a page may show."""
    later = now_ms() + 600_000
    kinds = (
        {"status": "parked", "last_error": "401 Unauthorized", "destination": "billing"},
        {"status": "parked", "last_error": "401 Unauthorized", "event_type": "invoice_paid"},
        {"status": "abandoned", "last_error": "permanent: 422 Unprocessable Entity", "retry_count": 3},
        {"status": "sent", "sent_at_ms": NOON_MS},
        {"status": "sending", "next_attempt_at_ms": later},
        {"next_attempt_at_ms": later, "waits_for": "service", "last_error": "503 Down", "retry_count": 1},
    )
    found = [add_row(outbox, **columns) for columns in kinds]
    add_row(outbox, event_type="deleted", status="abandoned")
    outbox.purge(event_type="deleted")
    return found


def test_an_operator_finds_selects_and_retries_events(open_page, outbox, rows):
    page = open_page()
    page.get_by_role("link", name="Events", exact=True).click()
    page.get_by_label("parked").check()
    page.get_by_role("button", name="Find").click()
    expect(page.get_by_role("row")).to_have_count(3)  # with the heading
    page.get_by_label("Select event 1").check()
    page.get_by_label("Select event 2").check()
    expect(page.get_by_text("2 selected")).to_be_visible()
    page.get_by_role("button", name="Retry…").click()
    expect(page.get_by_role("heading", name="Retry 2 events?")).to_be_visible()
    assert statuses(outbox)[:2] == ["parked", "parked"]
    page.get_by_role("button", name="Retry 2 events").click()
    expect(page.get_by_text("2 events were made due.")).to_be_visible()
    assert statuses(outbox)[:2] == ["pending", "pending"]
    expect(page.get_by_label("parked")).to_be_checked()


def test_an_operator_abandons_all_that_match(open_page, outbox, rows):
    page = open_page("/events?destination=billing")
    page.get_by_label("All that match").check()
    page.get_by_role("button", name="Abandon…").click()
    page.get_by_label("Reason").fill("the customer left")
    page.get_by_role("button", name="Abandon 1 event").click()
    expect(page.get_by_text("1 event was abandoned.")).to_be_visible()
    assert row(outbox, 1).last_error == "cancelled: the customer left"
    assert statuses(outbox)[1] == "parked"


def test_an_operator_holds_and_resumes_a_destination(open_page, outbox, rows):
    page = open_page("/destinations")
    page.get_by_text("Put billing on hold…").click()
    billing = page.get_by_role("region", name="billing")
    billing.get_by_label("Why").fill("it moves")
    billing.get_by_label("For how long").fill("2h")
    billing.get_by_role("button", name="Hold billing").click()
    expect(page.get_by_text("billing is on hold.")).to_be_visible()
    assert [hold.why for hold in outbox.stats().holds] == ["it moves"]
    page.get_by_role("button", name="Resume billing").click()
    expect(page.get_by_text("billing is no longer on hold.")).to_be_visible()
    assert outbox.stats().holds == []


def test_all_on_a_page_can_be_selected_at_once(open_page, rows):
    page = open_page("/events")
    page.get_by_label("All on this page").check()
    expect(page.get_by_text("6 selected")).to_be_visible()
    page.get_by_label("Select event 1").uncheck()
    expect(page.get_by_text("5 selected")).to_be_visible()
    page.get_by_label("All that match").check()
    page.get_by_label("Select event 1").check()
    expect(page.get_by_role("radio", name="6 selected")).to_be_checked()


def test_a_keyboard_is_enough(open_page, outbox, rows):
    page = open_page("/events?status=abandoned")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name") == "row":
            break
    page.keyboard.press("Space")
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "Requeue…":
            break
    page.keyboard.press("Enter")
    button = page.get_by_role("button", name="Requeue 1 event")
    button.focus()
    expect(button).to_be_focused()
    expect(button).to_have_css("outline-style", "solid")  # the style sheet may arrive after the page
    page.keyboard.press("Enter")
    expect(page.get_by_text("1 event was requeued.")).to_be_visible()
    assert statuses(outbox)[2] == "pending"


def test_without_scripts_everything_works_but_the_updates(open_page, outbox, rows):
    page = open_page("/", java_script_enabled=False)
    expect(page.get_by_role("button", name="Pause updates")).to_be_hidden()
    page.get_by_role("link", name="Abandoned events").click()
    page.get_by_label("Select event 3").check()
    page.get_by_role("button", name="Purge…").click()
    page.get_by_role("button", name="Purge 1 event").click()
    expect(page.get_by_text("1 event was deleted for good.")).to_be_visible()
    assert "abandoned" not in statuses(outbox)


def test_the_overview_follows_the_outbox(open_page, outbox, monkeypatch):
    monkeypatch.setattr(looks, "FRESH_S", 0)
    monkeypatch.setattr(looks, "_PART_OF_TIME", 0)
    page = open_page()
    expect(page.get_by_text("The outbox is empty")).to_be_visible()
    page.clock.install()
    page.reload()
    outbox.enqueue(rule_fired())
    page.clock.run_for(4_000)
    expect(page.locator("#tile-pending")).to_have_text("1")
    # What changed is said to those who do not see it, and the focus stays where it was.
    expect(page.get_by_role("status")).to_have_text("1 event is on the way")
    page.locator("#tile-pending").focus()
    outbox.enqueue(rule_fired())
    page.clock.run_for(4_000)
    expect(page.locator("#tile-pending")).to_have_text("2")
    expect(page.locator("#tile-pending")).to_be_focused()


def test_nothing_is_asked_for_while_nobody_looks(open_page):
    page = open_page()
    page.clock.install()
    page.reload()
    page.get_by_role("button", name="Pause updates").click()
    expect(page.get_by_text("Updates are paused")).to_be_visible()
    # Only now: the page's clock goes on by itself too, so a slow click lets it ask once more.
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.clock.run_for(30_000)
    expect(page.get_by_text("Updates are paused")).to_be_visible()
    page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    page.get_by_role("button", name="Pause updates").click()
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.clock.run_for(30_000)
    assert asked == []
    page.evaluate("Object.defineProperty(document, 'hidden', {value: false})")
    with page.expect_request("**/live"):
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def test_numbers_that_are_old_are_said_to_be_old(open_page, browser, console):
    page = browser.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.clock.install()
    page.goto(console)
    page.route("**/live", lambda route: route.abort())
    page.clock.run_for(4_000)
    expect(page.get_by_text("No answer; these numbers are old")).to_be_visible()
    page.unroute("**/live")
    page.clock.run_for(4_000)
    expect(page.get_by_text("Updates live")).to_be_visible()
    page.close()


def test_a_payload_that_is_a_script_is_only_shown(open_page, outbox):
    add_row(
        outbox,
        payload_json=f'{{"text":"{SCRIPT}"}}',
        status="parked",
        event_type=SCRIPT,
        last_error=SCRIPT,
        session_id=SCRIPT,
        file_path=SCRIPT,
    )
    page = open_page("/events/1")
    expect(page.locator("pre")).to_contain_text(SCRIPT)
    for path in PAGES:
        page.goto(urlsplit(page.url)._replace(path="", query="").geturl() + path)
        assert page.evaluate("window.hacked") is None
        assert page.locator("main script, main img").count() == 0


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 380)])
def test_no_page_keeps_anybody_out(open_page, console, rows, scheme, width):
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    for path in PAGES:
        page.goto(console + path)
        found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        serious = [one for one in found if one["impact"] in {"serious", "critical"}]
        assert [(path, one["id"], one["nodes"][0]["html"]) for one in serious] == []


def test_dark_is_dark(open_page, rows):
    page = open_page(color_scheme="dark")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert all(int(part) < 40 for part in re.findall(r"\d+", background))
    text_color = page.evaluate("getComputedStyle(document.body).color")
    assert all(int(part) > 200 for part in re.findall(r"\d+", text_color))


def test_a_phone_scrolls_in_one_direction_only(open_page, console, rows):
    page = open_page(viewport={"width": 380, "height": 700}, has_touch=True, is_mobile=True)
    for path in PAGES:
        page.goto(console + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 380, path
    page.goto(f"{console}/events")
    first, second = page.locator("tbody tr").nth(0).bounding_box(), page.locator("tbody tr").nth(1).bounding_box()
    assert first["height"] > 80
    assert second["y"] > first["y"] + first["height"]
    expect(page.get_by_role("button", name="Retry…")).to_be_in_viewport()  # the bar stays


@pytest.mark.parametrize("width", [380, 1180])
def test_ids_and_the_usual_types_stay_in_one_line(open_page, outbox, width):
    failure = "permanent: 422 Unprocessable Entity: the amount of an invoice must be positive. " * 2
    for row_id in (1_800_000, 1_800_001):
        add_row(outbox, id=row_id, event_type="invoice_paid", status="abandoned", last_error=failure)
    page = open_page("/events", viewport={"width": width, "height": 800})
    lines = "cell => Array.from(cell.childNodes).map(node => {"
    lines += " const range = document.createRange(); range.selectNodeContents(node); return range.getClientRects().length })"
    for label in ("Id", "Type"):
        cell = page.locator(f"td[data-label={label}]").first
        assert cell.evaluate(lines) == [1], label


def test_no_page_asks_another_server(open_page, console, rows):
    page = open_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    for path in PAGES:
        page.goto(console + path)
    assert asked
    assert {urlsplit(url).netloc for url in asked if not url.startswith("data:")} == {urlsplit(console).netloc}


def test_a_secret_opens_the_console_and_a_logout_closes_it(open_page, outbox):
    with served(create_app(outbox, secret=SECRET)) as url:
        page = open_page("/events", url=url)
        expect(page.get_by_label("Secret")).to_be_focused()
        page.keyboard.type(SECRET)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="Overview")).to_be_visible()
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_text("You are logged out.")).to_be_visible()
        page.goto(f"{url}/events")
        expect(page.get_by_label("Secret")).to_be_visible()


MANY = """
INSERT INTO observation_events (event_type, occurred_at_ms, payload_json, status, created_at_ms, next_attempt_at_ms,
    sent_at_ms, destination, waits_for, last_error, retry_count)
WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 100000)
SELECT 'type_' || (n % 5), :now - n, '{"event_type":"type","order":' || n || '}',
    CASE n % 10 WHEN 0 THEN 'parked' WHEN 1 THEN 'abandoned' WHEN 2 THEN 'pending' ELSE 'sent' END, :now - n, :now + 1000000000,
    CASE WHEN n % 10 > 2 THEN :now - n END, CASE n % 3 WHEN 0 THEN '' ELSE 'destination_' || (n % 3) END,
    CASE n % 10 WHEN 2 THEN 'service' END, CASE WHEN n % 10 < 3 THEN '503 Down' END, n % 7
FROM numbers
"""


def test_a_hundred_thousand_events_are_no_burden(open_page, outbox):
    with writing(outbox.engine) as connection:
        connection.execute(text(MANY), {"now": now_ms()})
    app = create_app(outbox, may_enter=lambda environ: True)
    took_ms = {}

    def measured(environ, start_response, answer=app.wsgi_app):
        # The time that this thread works: how long it waits for others says nothing about the page.
        began_s = time.thread_time()
        try:
            return answer(environ, start_response)
        finally:
            path = f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"
            took_ms[path] = min((time.thread_time() - began_s) * 1_000, took_ms.get(path, math.inf))

    app.wsgi_app = measured
    with served(app) as url:
        page = open_page("/events", url=url)
        page.get_by_label("Payload contains").fill('"order":777}')
        page.get_by_role("button", name="Find").click()
        page.get_by_role("link", name="Search further").wait_for()
        for path in (
            *PAGES,
            "/events?status=parked&destination=destination_1",
            "/events?order=oldest",
            "/events?failure=no+such+text",
            "/events?event_type=type_3&older_than=10s",
            "/events/confirm?do=retry&scope=all",
        ):
            for _ in range(2):
                assert page.request.get(url + path).ok
        page.goto(f"{url}/events/confirm?do=retry&scope=all")
        expect(page.get_by_role("heading", name="Retry 20,000 events?")).to_be_visible()
    print(*(f"{took:.0f} ms for {path}" for path, took in took_ms.items()), sep="\n")
    assert {path: took for path, took in took_ms.items() if took > 300} == {}
