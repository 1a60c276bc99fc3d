"""Invariants: the page is one file without scripts or addresses to load; it shows what the folders hold and says
what they do not; in a real browser it asks for nothing, logs nothing, fits a phone and follows dark mode."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import english_pairs, write_jsonl
from PIL import Image

from anchor.encoding.encoder import Encoder
from anchor.errors import ConfigError, DataError
from eval.__main__ import main
from eval.reporting.report import Looks, write_report
from eval.reporting.report_data import flat_map, read_run, retrieval_pairs

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian's package of that name)")


def make_run(folder: Path, steps: int = 5, score: float = 0.25) -> Path:
    rows = [
        {
            "step": step,
            "loss/total_nats": 5 / step,
            "optim/grad_norm": 1.0 + step,
            "data/tokens": 100,
            "time/step_seconds": 0.5,
            "memory/peak_gib": 1.5,
        }
        for step in range(1, steps + 1)
    ]
    write_jsonl(folder / "metrics.jsonl", rows)
    (folder / "run.yaml").write_text("commit: abc1234\nrecipe: {seed: 0, note: '<script>alert(1)</script>'}\n")
    (folder / "mteb").mkdir()
    scores = {"SciFact": score, "STS <&> 16": 0.5}
    (folder / "mteb/scores.json").write_text(json.dumps({"scores": scores, "revision": "r"}))
    return folder


@pytest.fixture(scope="module")
def page(export_dir, tmp_path_factory) -> Path:
    """Report with every section."""
    root = tmp_path_factory.mktemp("report")
    pairs = write_jsonl(root / "pairs.jsonl", english_pairs(20))
    labelled = [{"text": row["query"], "label": f"group {i % 3}"} for i, row in enumerate(english_pairs(15))]
    decoded = [
        {
            "source": "a <b>",
            "decoded": "c",
            "direction": "document_to_query",
            "reference": "d",
            "token_f1": 0,
            "rouge_l": 0,
        }
    ]
    write_report(
        [read_run(str(make_run(root / "first"))), read_run(f"two={make_run(root / 'second', 3, 0.5)}")],
        root / "report.html",
        looks=Looks(
            Encoder(export_dir, dtype="fp32"),
            pairs,
            write_jsonl(root / "labelled.jsonl", labelled),
            write_jsonl(root / "decoded.jsonl", decoded),
        ),
    )
    return root / "report.html"


class Links(HTMLParser):
    """Collect ids, targets and everything that a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name in ("href", "xlink:href", "src", "srcset", "data") and value is not None:
                (self.targets if value.startswith("#") else self.loads).append(value)


def test_the_page_loads_nothing_and_its_links_lead_somewhere(page):
    text = page.read_text()
    links = Links()
    links.feed(text)
    assert links.loads == []
    assert links.tags & {"script", "link", "img", "iframe"} == set()
    assert "@import" not in text
    assert {"#runs", "#training", "#scores", "#similarity", "#neighbours", "#map", "#decoded", "#provenance"} <= set(
        links.targets
    )
    assert {target[1:] for target in links.targets} <= set(links.ids)
    assert len(text) < 300_000


def test_the_page_shows_what_the_folders_hold_and_escapes_it(page):
    text = page.read_text()
    for words in ("first", "two", "abc1234", "25.00", "50.00 ★", "200 tokens/s", "1.50 GiB", "STS &lt;&amp;&gt; 16"):
        assert words in text, words
    assert "&lt;script&gt;alert(1)" in text
    assert "a &lt;b&gt;" in text
    assert re.search(r"20 pairs\. Mean cosine", text)


def test_scrolling_and_folding_parts_take_the_keyboard(page):
    text = page.read_text()
    assert text.count('class="scroll" tabindex="0" role="region"') == text.count('class="scroll"') > 0
    assert "<summary>" in text
    assert 'href="#content"' in text


def test_untrained_runs_and_bare_results_have_no_curves(tmp_path):
    run = make_run(tmp_path / "none", steps=0)
    write_report([read_run(str(run)), read_run(f"bare={run / 'mteb'}")], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "<svg" not in text
    assert 'href="#training"' not in text
    assert "only results are known" in text


def test_the_star_of_harmful_queries_goes_to_the_safer_model(tmp_path):
    """Regression: AdvBench-IR is the share of harmful queries that find their passage; the highest share won."""
    runs = []
    for label, score in (("safe", 0.25), ("unsafe", 0.75)):
        folder = make_run(tmp_path / label) / "mteb"
        (folder / "scores.json").write_text(json.dumps({"scores": {"AdvBench-IR": score, "SciFact": score}}))
        runs.append(read_run(f"{label}={folder}"))
    write_report(runs, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    starred = {line.split("</th>")[0].split(">")[-1]: line for line in text.splitlines() if "★" in line}
    assert "25.00 ★" in starred["AdvBench-IR"]
    assert "75.00 ★" in starred["SciFact"]
    assert starred["AdvBench-IR"].count("★") == 1


def test_the_command_writes_a_benchmark_table_beside_published_rows(tmp_path, capsys):
    from test_table import made_up_results

    from eval.scoring.tasks import find_benchmark

    results = tmp_path / "run/mteb"
    for result in made_up_results(find_benchmark("MTEB(eng, v1)"), leave_out=("SciFact",)):
        path = results / "results/m/r" / f"{result.task_name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        result.to_disk(path)
    (results / "scores.json").write_text(json.dumps({"scores": {"ArguAna": 0.1}, "revision": "r"}))
    command = ["report", str(tmp_path / "run"), "--benchmark", "MTEB(eng, v1)", "--output", str(tmp_path / "r.html")]
    main(command)
    text = (tmp_path / "r.html").read_text()
    assert "Llama-3.2-1B-Instruct, Anchor (published)" in text
    assert "62.24" in text
    assert "run: averages are withheld, 1 tasks have no result: SciFact" in text
    with pytest.raises(SystemExit):
        main(command)
    assert "exists; choose another --output or add --overwrite" in capsys.readouterr().err


def test_what_is_missing_is_named(tmp_path):
    for name in ("nowhere", "n" * 999):
        with pytest.raises(ConfigError, match="no such folder"):
            read_run(str(tmp_path / name))
    with pytest.raises(ConfigError, match=r"neither metrics\.jsonl nor scores\.json"):
        read_run(str(tmp_path))
    run = make_run(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"two folders are called 'a'; name them: LABEL=DIR"):
        write_report([read_run(str(run)), read_run(str(run))], tmp_path / "r.html")
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    assert read_run(str(run)).metrics == [{"step": 1}]  # the half line of a killed run


def test_a_folder_whose_name_holds_an_equals_sign_is_that_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs/lr=2e-5")
    for item, label in (("runs/lr=2e-5", "lr=2e-5"), ("mine=runs/lr=2e-5", "mine")):
        run = read_run(item)
        assert (run.label, run.folder) == (label, Path("runs/lr=2e-5"))


NO_STEP = "a row without a 'step' that is a number; expected the metrics of a run"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"stop": 1}\n', f"metrics.jsonl:1: {NO_STEP}"),
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 2}\n', "metrics.jsonl:2: malformed JSON: "),
        ("metrics.jsonl", "[]\n", f"metrics.jsonl:1: {NO_STEP}"),
        ("metrics.jsonl", "null\n", f"metrics.jsonl:1: {NO_STEP}"),
        ("metrics.jsonl", "7\n", f"metrics.jsonl:1: {NO_STEP}"),
        ("metrics.jsonl", '{"step": "1"}\n', f"metrics.jsonl:1: {NO_STEP}"),
        ("metrics.jsonl", '{"step": true}\n', f"metrics.jsonl:1: {NO_STEP}"),
        ("metrics.jsonl", '{"step": NaN}\n', f"metrics.jsonl:1: {NO_STEP}"),
        ("metrics.jsonl", f'{{"step": 1, "a": {"9" * 400}}}\n', "metrics.jsonl:1: 'a' is a number of 400 digits; exp"),
        (
            "metrics.jsonl",
            f'{{"step": {"9" * 5000}}}\n',
            "metrics.jsonl:1: malformed JSON: a number has more than 4300 digits; expected the metrics of a run",
        ),
        (
            "metrics.jsonl",
            "[" * 100_000 + "\n",
            "metrics.jsonl:1: malformed JSON: lists or objects are nested too deep",
        ),
        ("metrics.jsonl", bytes(range(128, 256)) + b"\n", "metrics.jsonl:1: not UTF-8: byte 1 is 0x80"),
        ("metrics.jsonl", '{"step": 1}\n'.encode("utf-16"), "metrics.jsonl: UTF-16 text, expected UTF-8"),
        ("run.yaml", "a: " + "[" * 100_000, "run.yaml: not readable: "),
        ("run.yaml", "a: \x07", "run.yaml: not readable: unacceptable character"),
        ("run.yaml", f"a: {'9' * 5000}", "run.yaml: not readable: "),
        ("mteb/scores.json", "[" * 100_000, "mteb/scores.json: not readable; delete it"),
        ("mteb/scores.json", "[]", "mteb/scores.json: not readable; delete it"),
        ("mteb/scores.json", f'{{"scores": {{"SciFact": {"9" * 400}}}}}', "mteb/scores.json: not readable; delete it"),
        (
            "d.jsonl",
            '{"source": "a", "decoded": "b", "rouge_l": "x"}\n',
            "d.jsonl:1: 'rouge_l' is 'x'; expected a number",
        ),
        (
            "d.jsonl",
            '{"source": "a", "decoded": "b", "direction": 1}\n',
            "d.jsonl:1: 'direction' is 1; expected a text",
        ),
        ("run.yaml", "recipe: {seed: 0,", "run.yaml: not readable: while parsing a flow"),
        ("run.yaml", b"note: d\xe9j", "run.yaml: not UTF-8: byte 8 is 0xe9"),
        (
            "mteb/scores.json",
            '{"scores": {"SciF',
            "mteb/scores.json: not readable; delete it, the scores are in results/",
        ),
        (
            "mteb/scores.json",
            '{"revision": "r"}',
            "mteb/scores.json: not readable; delete it, the scores are in results/",
        ),
        ("d.jsonl", '{"source": "a"}\n', "d.jsonl:1: no field 'decoded' with a text; known are source"),
        ("d.jsonl", '["source"]\n', "d.jsonl:1: no field 'source' with a text"),
        ("d.jsonl", '{"source": "a", "decoded": "b"}\n{"so', "d.jsonl:2: malformed JSON: "),
    ],
)
def test_what_a_report_cannot_read_is_one_line(tmp_path, capsys, name, content, message):
    run = make_run(tmp_path / "a")
    (run / "d.jsonl").write_text('{"source": "a", "decoded": "b\u2028c"}\n')
    command = ["report", str(run), "--output", str(tmp_path / "r.html"), "--decoded", str(run / "d.jsonl")]
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as stop:
        main([*command, "--overwrite"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {run}/{message}")


NAMES = ["$\\frac{$", "_hidden", "$a$", "a\x00b\x1b[31m\x9b", "x\ud800", "漢字 नमस्ते 😀", "\\alpha^", "l" * 999]


def test_whatever_runs_and_groups_are_called_the_page_shows_it(export_dir, tmp_path):
    r"""Regression: `$\frac{$` gave a traceback; matplotlib left names that begin with '_' out of the legend."""
    runs = [read_run(f"{name}={make_run(tmp_path / f'run{i}')}") for i, name in enumerate(NAMES)]
    labelled = [{"text": row["query"], "label": NAMES[i % len(NAMES)]} for i, row in enumerate(english_pairs(16))]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    decoded = [{"source": name.encode(errors="replace").decode(), "decoded": "c", "reference": "d"} for name in NAMES]
    looks = Looks(
        Encoder(export_dir, dtype="fp32"),
        labelled=tmp_path / "labelled.jsonl",
        decoded=write_jsonl(tmp_path / "decoded.jsonl", decoded),  # without rouge_l
    )
    write_report(runs, tmp_path / "r.html", title=" ".join(NAMES), looks=looks)
    text = html.unescape((tmp_path / "r.html").read_text(encoding="utf-8"))
    figures = re.findall("<svg.*?</svg>", text, re.DOTALL)
    assert len(figures) == 5  # four curves and the map
    for name in NAMES:
        expected = re.sub("[\x00-\x08\x1b\x9b\ud800]", "\ufffd", name)
        assert f"<h3>{expected}</h3>" in text
        assert all(expected[:50] in figure for figure in figures)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_numbers_that_are_none_leave_the_curves_readable(tmp_path):
    run = make_run(tmp_path / "a")
    odd = [
        {"step": 6, "loss/total_nats": float("nan"), "optim/grad_norm": float("inf")},
        {"step": 7, "loss/total_nats": "no", "time/step_seconds": "x", "data/tokens": 3},
        {"step": 8, "loss/total_nats": True, "time/step_seconds": 0.0, "data/tokens": 3},
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in odd)
    write_report([read_run(str(run))], tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text().count("<svg") == 4


def test_retrieval_folders_give_their_judged_pairs(tmp_path):
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q", "text": "query"}])
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "d", "title": "t", "text": "x"}, {"_id": "e", "text": "y"}])
    judged = [{"query-id": "q", "corpus-id": one, "score": score} for one, score in (("d", 1), ("e", 0))]
    write_jsonl(tmp_path / "qrels/test.jsonl", judged)
    assert retrieval_pairs(tmp_path) == [("query", "t x")]
    for name, row, message in (
        ("queries.jsonl", {"text": "query"}, "no field '_id'"),
        ("corpus.jsonl", {"_id": "d", "text": None}, "'text' is null; expected a text"),
        ("qrels/test.jsonl", {"query-id": "q", "corpus-id": "d", "score": "1"}, "'score' is '1'; expected a number"),
    ):
        kept = (tmp_path / name).read_text()
        write_jsonl(tmp_path / name, [row])
        with pytest.raises(DataError) as error:
            retrieval_pairs(tmp_path)
        assert str(error.value).startswith(f"{tmp_path / name}:1: {message}")
        (tmp_path / name).write_text(kept)


def test_the_map_keeps_groups_apart():
    draw = np.random.default_rng(0)
    centres = np.repeat(np.eye(3, 8), 12, axis=0)
    points = flat_map((centres + 0.05 * draw.standard_normal(centres.shape)).astype(np.float32))
    groups = np.repeat(np.arange(3), 12)
    distance = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(36)
    assert (groups[distance.argmin(axis=1)] == groups).mean() == 1


def in_browser(page: Path, out: Path, width: int, *, dark: bool) -> tuple[Image.Image, str]:
    """Return a screenshot of the page, and what the browser logged."""
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-extensions",
        "--force-device-scale-factor=1", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--window-size={width},1200", f"--screenshot={out}", f"--log-net-log={out}.net.json",
        f"--user-data-dir={out}.profile", "--enable-logging=stderr", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return Image.open(out).convert("RGB"), done.stderr


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1440])
def test_a_browser_asks_for_nothing_and_logs_nothing(page, tmp_path, width, dark):
    image, log = in_browser(page, tmp_path / "shot.png", width, dark=dark)
    assert "CONSOLE" not in log
    asked = set(re.findall(r'"url":"(\w+://[^"]*)"', (tmp_path / "shot.png.net.json").read_text()))
    assert {url for url in asked if page.name in url or "report" in url} <= {page.as_uri()}
    background = image.getpixel((2, 600))
    assert (max(background) < 60) if dark else (min(background) > 220)
    assert image.size == (width, 1200)
    assert len(image.getcolors(1 << 24)) > 50
