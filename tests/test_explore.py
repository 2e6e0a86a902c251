"The explorer: what it shows of a run, that a stranger's text stays text, and both pages in a real browser, where there is one."
import html, json, os, re, shutil, signal, subprocess, sys, time, urllib.error, urllib.request
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from embodied_midtrain.cli import main
from embodied_midtrain.core import Stage, read_table, write_table
from embodied_midtrain.explore import INSTALL, LETTERS, SCRIPT, THUMBNAIL, card_text, explore, explore_widget, explored_rows, fair_counts, gallery_page, neighbours, serve, thumbnail
from embodied_midtrain.keep import features_of
from embodied_midtrain.samples import ImageRef, Sample, turn
from embodied_midtrain.selection import hold_out, select
from embodied_midtrain.sources.base import open_sources, sources_hash
from embodied_midtrain.vectors import feature_table, read_features

DATA = Path(__file__).parent / "data"
HOSTILE = ["<script>window.hit = 1</script>", "\"><img src=x onerror='window.hit = 1'>", "</p></article></section><h1>mine</h1>", "<svg onload=window.hit=1>", "http://attacker.example/a.png", "&lt;b&gt; {{7*7}} ${7*7} %s"]
SHOWN = dict(samples=150)


def hostile_source(folder):
    "A LLaVA file whose texts try to be more than text; one picture is broken, one sample has none."
    names = ["robopoint/sink.jpg"] * len(HOSTILE) + ["broken.jpg", None]
    (folder / "broken.jpg").write_bytes((DATA / "robopoint/sink.jpg").read_bytes()[:3000])
    shutil.copytree(DATA / "robopoint", folder / "robopoint")
    records = [{"id": str(i), **({"image": name} if name else {}), "conversations": [{"from": "human", "value": "<image>\n" * bool(name) + f"zebra {text}"}, {"from": "gpt", "value": text}]}
               for i, (name, text) in enumerate(zip(names, [*HOSTILE, "broken", "none"]))]
    (folder / "hostile.json").write_text(json.dumps(records))
    return dict(reader="llava", name="<b>hostile", path=str(folder / "hostile.json"), images=str(folder))


def finished_run(folder, pool, robots, k=60):
    "The stages of a run that the explorer reads, with features and scores of ours."
    samples = [s for source in open_sources([*pool, *robots]) for s in source]
    sources, kinds = np.array([s.source for s in samples]), np.array([s.kind for s in samples])
    rng = np.random.default_rng(0)
    x = rng.normal(np.eye(8)[np.unique(sources, return_inverse=True)[1]] * 5, 1)
    scored = pd.DataFrame(dict(id=[s.id for s in samples], source=sources, seed=0, score=1 / (1 + np.exp(-x[:, 0])), logit=x[:, 0], random=rng.random(len(x))))
    with Stage(folder, "features", dict(pool=pool, robots=robots), dict(sources=sources_hash([*pool, *robots]))) as stage:
        for i, part in enumerate(np.array_split(np.arange(len(x)), 3)): write_table(feature_table([samples[j] for j in part], x[part]), stage.file(f"part-{i:02}-00000.parquet"))
    with Stage(folder, "proximity") as stage:
        write_table(scored[kinds == "vlm"], stage.file("scores/part-00000.parquet"))
        write_table(scored[kinds == "vla"], stage.file("robots.parquet"))
    with Stage(folder, "selection", dict(k=k, seeds=[0])) as stage:
        pool_scores = scored[kinds == "vlm"]
        apart = hold_out(pool_scores, 5)
        write_table(apart, stage.file("held_out.parquet"))
        write_table(select(pool_scores[~pool_scores.id.isin(apart.id)], k, ["proximity", "random"], [0]), stage.file("selection.parquet"))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explored")
    pool = [dict(reader="tabletop", name=name, count=90) for name in ("mini-laion", "mini-refspatial")] + [hostile_source(folder)]
    return finished_run(folder / "runs" / "toy & co", pool, [dict(reader="tabletop_robot", name="tabletop-reach", task="reach", count=12)])


@pytest.fixture(scope="module")
def table(run): return pq.read_table(explore(run, **SHOWN).file("samples.parquet")).to_pandas()


# ---- which samples

@pytest.mark.parametrize("total", [1, 7, 40, 400, 10**6])
def test_shares_are_fair(total):
    sizes = dict(a=3, b=1000, c=20, d=1000)
    counts = fair_counts(sizes, total)
    assert sum(counts.values()) == min(total, sum(sizes.values())) and all(counts[name] <= sizes[name] for name in sizes)
    cut = [counts[name] for name in sizes if counts[name] < sizes[name]]
    assert not cut or max(counts.values()) - min(cut) <= 1  # only a dataset that gave all it has may give less


def test_rows_are_those_of_the_run(run):
    rows = explored_rows(run, 150, 6).set_index("id")
    scores, apart, chosen = read_table(run / "proximity/scores").set_index("id"), set(read_table(run / "selection/held_out.parquet").id), read_table(run / "selection/selection.parquet")
    ranked = [i for i in scores.logit.sort_values(ascending=False).index if i not in apart]
    assert rows.score.equals(pd.concat([scores, read_table(run / "proximity/robots.parquet").set_index("id")]).score[rows.index])
    for i, row in rows[rows.kind == "vlm"].iterrows():
        arms = set(chosen.arm[chosen.id == i])
        assert row.selected == ("held out" if i in apart else " + ".join(a for a in ("proximity", "random") if a in arms) or "no")
        if i not in apart: assert ranked[row["rank"] - 1] == i
    assert [*rows.index[rows.place == "highest"]] == sorted(ranked[:6], key=list(rows.index).index) and set(ranked[-6:]) == set(rows.index[rows.place == "lowest"])
    assert sorted(rows["rank"][rows.place == "boundary"]) == [58, 59, 60, 61, 62, 63]  # three kept, three not
    assert set(rows.dataset) == {"mini-laion", "mini-refspatial", "<b>hostile", "robot data"}


def test_features_are_found_part_by_part(run):
    features = read_features(run / "features")
    some = np.random.default_rng(1).permutation(len(features))[:50]
    assert np.array_equal(features_of(run / "features", pd.Series(features.ids[some])), features.x[some])


def test_neighbours_against_all_distances():
    x = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    distance = np.linalg.norm(x[:, None] - x[None], axis=2) + np.diag(np.full(40, np.inf))
    found = neighbours(x, [f"s/{i}" for i in range(40)], 4)
    for i, one in enumerate(found):
        assert one["ids"] == [f"s/{j}" for j in np.argsort(distance[i])[:4]] and np.allclose(one["distances"], np.sort(distance[i])[:4], rtol=1e-4)
    assert len(neighbours(x[:3], list("abc"))[0]["ids"]) == 2


# ---- made once

def test_made_once_and_anew_when_the_run_changes(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("explore"))
    stage = explore(copy, samples=20, ends=2, per_source=2)
    made = {f.name: f.stat().st_mtime_ns for f in stage.path.iterdir()}
    assert {f.name: f.stat().st_mtime_ns for f in explore(copy, samples=20, ends=2, per_source=2).path.iterdir()} == made
    assert explore(copy, samples=21, ends=2, per_source=2).key != stage.key and not stage.done
    with Stage(copy, "selection", dict(k=50, seeds=[0])) as selection: write_table(read_table(run / "selection/selection.parquet"), selection.file("selection.parquet"))
    again = explore(copy, samples=20, ends=2, per_source=2)
    assert again.key != stage.key and sorted(f.name for f in again.path.iterdir()) == ["gallery.html", "manifest.json", "samples.parquet"]


def test_a_run_that_is_not_finished(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("explore", "selection"))
    assert main(["explore", str(copy)]) == 2 and "selection" in capsys.readouterr().err
    assert main(["explore", str(run), "--projection", "tnse"]) == 2 and "did you mean 'tsne'?" in capsys.readouterr().err


# ---- text and pictures

def test_samples_without_a_good_picture_are_shown_too(table):
    hostile = table[table.source == "<b>hostile"].set_index("id")
    broken, none = (hostile.loc[f"<b>hostile/{i}"] for i in (len(HOSTILE), len(HOSTILE) + 1))
    assert broken.image is None and broken.text.endswith("(no picture: image cannot be decoded)") and none.image is None and "no picture" not in none.text
    assert hostile.image.notna().sum() == len(HOSTILE) and max(ImageRef(data=hostile.image.dropna().iloc[0]["bytes"]).open().size) == THUMBNAIL


def test_cards_are_small():
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3)).astype(np.uint8)
    assert len(thumbnail(ImageRef(array=noise))) < 16_000
    long = Sample("s/1", "s", "vlm", (), (turn("user", "word " * 9000), turn("assistant", "x" * 50_000)))
    assert len(card_text(long)) < 2 * LETTERS + 20


class Parsed(HTMLParser):
    "What a browser sees: tags, attributes, and text in order."
    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, data): self.text.append(data)


def test_a_strangers_text_stays_text(table, run):
    page = explore(run, **SHOWN).file("gallery.html").read_text(encoding="utf-8")
    seen = Parsed(page)
    assert [tag for tag, _ in seen.tags if tag in ("script", "iframe", "object", "embed", "link", "base", "svg")] == ["link", "script"]
    assert not [name for _, attrs in seen.tags for name in attrs if name.startswith("on")]
    assert all(attrs["src"].startswith("data:image/jpeg;base64,") for tag, attrs in seen.tags if tag == "img")
    shown = Parsed(gallery_page(table[table.source == "<b>hostile"], "<i>run</i>", per_source=99)).text
    for text in HOSTILE: assert any(f"A: {text}" in t for t in shown), text
    assert {attrs["data-source"] for tag, attrs in seen.tags if tag == "article"} == set(table.source)


def test_the_gallery_is_small(table):
    page = gallery_page(table, "run", per_source=12)
    assert len(page) < 20_000 + page.count("<article") * (4 / 3 * 16_000 + 6 * 2 * LETTERS)


# ---- without the extra

def test_without_the_extra_there_is_the_gallery(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "embedding_atlas", None)
    copy = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("explore"))
    assert main(["explore", str(copy), "--samples", "20", "--no-browser"]) == 0
    said = capsys.readouterr().out
    assert INSTALL in said and "gallery.html" in said and (copy / "explore/gallery.html").exists()
    with pytest.raises(ImportError, match=re.escape(INSTALL)): explore_widget(copy, samples=20)


# ---- the server

def listen(run):
    "`emt explore` as a process of its own, and its address."
    words = ["explore", str(run), "--samples", str(SHOWN["samples"]), "--no-browser", "--port", "0"]
    process = subprocess.Popen([sys.executable, "-uc", "import sys; from embodied_midtrain.cli import main; sys.exit(main())", *words], stdout=subprocess.PIPE, text=True, env=os.environ | {"EMT_QUIET": "1"})
    for line in process.stdout:
        if found := re.search(r"http://127\.0\.0\.1:\d+/", line): return process, found[0]
    raise AssertionError("emt explore printed no address")


@pytest.fixture(scope="module")
def served(run, tmp_path_factory):
    pytest.importorskip("embedding_atlas")
    process, address = listen(run)
    yield address
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0, "Ctrl-C ends it well"


def ask(address, body=None, **headers):
    "Status, headers and content of an answer."
    request = urllib.request.Request(address, body and json.dumps(body).encode(), headers)
    for _ in range(100):
        try:
            with urllib.request.urlopen(request, timeout=20) as answer: return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error: return error.code, error.headers, error.read()


def test_only_its_own_page_may_ask(served):
    status, headers, page = ask(served)
    assert status == 200 and b"Embedding Atlas" in page and "default-src 'self'" in headers["content-security-policy"] and "http:" not in headers["content-security-policy"]
    assert ask(served, Host="attacker.example")[0] == 403 == ask(served + "data/query", dict(type="json", sql="SELECT 1"), Origin="http://attacker.example")[0]
    assert json.loads(ask(served + "data/query", dict(type="json", sql="SELECT COUNT(*) AS n FROM dataset"), Origin=served.rstrip("/"))[2])[0]["n"] >= SHOWN["samples"]


def test_the_server_reads_no_files(served, tmp_path):
    (tmp_path / "secret.csv").write_text("a\n1\n")
    for sql in f"SELECT * FROM read_csv('{tmp_path}/secret.csv')", "SET enable_external_access = true", f"COPY dataset TO '{tmp_path}/out.csv'":
        assert ask(served + "data/query", dict(type="json", sql=sql))[0] == 500
    assert not (tmp_path / "out.csv").exists() and ask(served + "../../../../etc/passwd")[0] in (400, 404)


def test_a_port_that_is_taken(run, served):
    with pytest.raises(OSError, match="--port"): serve(explore(run, **SHOWN), port=int(served.rstrip("/").split(":")[-1]), browser=False)


def test_widget(run, table):
    pytest.importorskip("embedding_atlas")
    widget, sent = explore_widget(run, **SHOWN), []
    assert widget.selection()["id"].to_pylist() == table.id.tolist() and widget._props["data"]["projection"] == dict(x="x", y="y")
    widget.send = lambda content, buffers=None: sent.append(content)
    widget._handle_custom_msg(dict(uuid="1", type="json", sql="SELECT COUNT(*) AS n FROM embedding_atlas WHERE image IS NOT NULL"), [])  # as the page in the notebook asks
    assert sent[0]["result"] == [dict(n=table.image.notna().sum())]


# ---- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER): pytest.skip("no chromium with chromedriver on PATH: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,900", "--enable-unsafe-swiftshader", "--no-first-run", f"--user-data-dir={tmp_path_factory.mktemp('chromium')}": options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def wait(what, seconds=60):
    "What a page comes to say."
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "the page did not get there"
        time.sleep(.1)
    return found


def asked_for(browser):
    "The addresses that pages asked for since the last call, apart from data in the page and pages of the browser itself."
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return {url for url in urls if url.startswith(("http", "ws", "file"))}


def find(browser, selector): return browser.find_elements("css selector", selector)


def count(browser):
    "How many points the map says it has: shown, and in all."
    said = re.search(r"([\d,]+) / ([\d,]+) points", browser.find_element("tag name", "body").text)
    return said and tuple(int(n.replace(",", "")) for n in said.groups())


def colours(browser):
    "How many pixels of the map are neither white nor grey."
    import io, PIL.Image
    picture = np.asarray(PIL.Image.open(io.BytesIO(find(browser, "canvas")[0].screenshot_as_png)).convert("RGB")).astype(int)
    return int((np.ptp(picture[60:-30, :int(picture.shape[1] * .75)], axis=2) > 60).sum())  # without the legend at the right, controls and messages


def test_the_map_in_a_browser(browser, served, table):
    browser.get_log("browser"), asked_for(browser)
    browser.get(served)
    assert wait(lambda: count(browser)) == (len(table), len(table))
    wait(lambda: colours(browser) > 500)

    find(browser, "button[aria-label=Search]")[0].click()
    wait(lambda: find(browser, "input[type=search]"))[0].send_keys("zebra")
    assert int(wait(lambda: re.search(r"(\d+) results?\.", browser.find_element("tag name", "body").text))[1]) == len(HOSTILE) + 2
    assert browser.execute_script("return window.hit") is None and not find(browser, "h1"), "text of the pool was run"
    assert any(image.get_property("naturalWidth") > 0 for image in find(browser, "img[src^='data:image/jpeg']"))

    before = colours(browser)
    next(e for e in browser.find_elements("xpath", "//*[text()='mini-laion']") if e.is_displayed()).click()
    wait(lambda: count(browser) == (int((table.source == "mini-laion").sum()), len(table)))
    wait(lambda: colours(browser) < before)
    assert {url for url in asked_for(browser) if not url.startswith(served)} == set()
    assert "Content Security Policy" not in " ".join(entry["message"] for entry in browser.get_log("browser")), "the page wanted what its policy forbids"


def test_the_gallery_in_a_browser(browser, run, table):
    gallery = explore(run, **SHOWN).file("gallery.html")
    browser.get("about:blank"), browser.get_log("browser"), asked_for(browser)
    browser.get(gallery.as_uri())
    said, total = find(browser, "output")[0], len(find(browser, "article"))
    def visible(what): return browser.execute_script(f"return [...document.querySelectorAll('article')].filter(a => a.getClientRects().length).map(a => a.dataset.{what})")
    assert said.text == f"{total} of {total} cards" and len(visible("source")) == total
    assert browser.execute_script("return [...document.images].every(image => image.complete && image.naturalWidth > 0)") and len(find(browser, "img")) > 20

    search, source, selected = find(browser, "input, select")
    search.send_keys("ZEBRA zebra")
    assert set(visible("source")) == {"<b>hostile"} and said.text == f"{len(visible('source'))} of {total} cards"
    search.send_keys(" no such word")
    assert said.text == f"0 of {total} cards" and not visible("source") and not [s for s in find(browser, "section") if s.is_displayed()]
    search.send_keys("\ue009a\ue000\ue003")  # Ctrl-A, Backspace
    assert len(visible("source")) == total
    next(o for o in find(source, "option") if o.text == "tabletop-reach").click()
    assert set(visible("source")) == {"tabletop-reach"}
    find(source, "option")[0].click(), next(o for o in find(selected, "option") if o.text == "random").click()
    assert visible("selected") and all("random" in names.split(" + ") for names in visible("selected"))

    assert browser.execute_script("return window.hit") is None and browser.get_log("browser") == [] and asked_for(browser) == {gallery.as_uri()}


def test_a_script_that_slipped_in_would_not_run(browser, run, tmp_path):
    "The page's policy holds even where the escaping would not."
    page = explore(run, **SHOWN).file("gallery.html").read_text(encoding="utf-8")
    (tmp_path / "slipped.html").write_text(page.replace("</form>", "</form><script>window.hit = 1</script><img src=x onerror='window.hit = 1'><img src='http://127.0.0.1:9/a.png'>", 1), encoding="utf-8")
    asked_for(browser), browser.get((tmp_path / "slipped.html").as_uri())
    assert find(browser, "output")[0].text.endswith("cards") and browser.execute_script("return window.hit") is None
    assert "Content Security Policy" in " ".join(entry["message"] for entry in browser.get_log("browser"))
