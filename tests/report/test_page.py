"""The page of a real ablation, in a real browser."""

import json
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from flowjobs.cli.main import main
from flowjobs.runs.run import Run
from tests.cluster.requirements import missing_browser
from tests.report.made_up import made_run

# Each run in a process of its own, forked from one that has loaded torch.
RUNNER = """
import itertools, os
import flowjobs.training.run_training
from flowjobs.cli import main
for flow, width, seed in itertools.product(("icfm", "otcfm"), (8, 16), range(3)):
    words = ["train", "--flow", flow, "--arch-args", f"width={width}", "depth=1", "--epochs", "4"]
    words += ["--seed", str(seed), "--wandb-mode", "disabled", "--no-evaluate"]
    if not (child := os.fork()):
        main([*words, "--name", f"{flow}-w{width}-s{seed}"])
    assert os.waitpid(child, 0)[1] == 0
"""
# Runs in the page, after its own script, and leaves what it sees where it can be read.
PROBE = """
<script>
const texts = (table, column) => [...document.querySelectorAll(`#${table} tbody tr`)]
  .filter((row) => !row.hidden).map((row) => row.cells[column].firstChild.textContent.trim());
const click = (table, column) =>
  document.querySelectorAll(`#${table} thead button`)[column].click();
const type = (words) => {
  document.getElementById("filter").value = words;
  document.getElementById("filter").dispatchEvent(new Event("input"));
};
const seen = {paper: getComputedStyle(document.body).backgroundColor};
seen.cells = texts("cells", 1);
click("cells", 1); seen.up = texts("cells", 1);
click("cells", 1); seen.down = texts("cells", 1);
seen.sorted = document.querySelectorAll("#cells th")[1].getAttribute("aria-sort");
seen.sizes = ["2M", "500k", "1_000", "10", "-2", "k", "", "-"]
  .map((text) => valueOf({dataset: {}, firstChild: {textContent: text}}));
click("runs", 2); seen.widths = texts("runs", 2);
type("flow=otcfm width=8"); seen.filtered = texts("runs", 0);
seen.rows = texts("cells", 0); seen.left = document.getElementById("left").textContent;
type("no such"); seen.none = texts("runs", 0);
type(""); seen.all = texts("runs", 0).length;
seen.loaded = performance.getEntriesByType("resource").map((entry) => entry.name)
  .filter((name) => !name.startsWith("data:"));
addEventListener("load", () => {
  seen.images = [...document.images].map((image) => image.naturalWidth);
  document.body.dataset.seen = JSON.stringify(seen);
});
</script>
"""


def in_browser(page: Path, *options: str) -> str:
    """What headless Chromium makes of a page that cannot reach anything."""
    if missing := missing_browser():
        if os.environ.get("CI") == "true":
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent}/browser"]
    done = subprocess.run(
        [*command, *options, page.as_uri()], capture_output=True, text=True, check=True, timeout=600
    )
    return done.stdout


def seen_in_browser(page: Path, *options: str) -> dict[str, Any]:
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    found = re.search(r'data-seen="([^"]*)"', in_browser(probed, *options))
    assert found
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen


def written(*words: str) -> Path:
    with pytest.raises(SystemExit) as ended:
        main(["report", "--html", "page.html", *words])
    assert ended.value.code == 0
    return Path("page.html").resolve()


def test_the_page_of_a_real_ablation_sorts_filters_and_tells_its_values(study: Path) -> None:
    subprocess.run([sys.executable, "-c", RUNNER], check=True, capture_output=True)
    page = written("--metric", "best_val_loss")
    cells = {
        (flow, width): [
            json.loads((study / f"runs/{flow}-w{width}-s{seed}/status.json").read_text())
            for seed in range(3)
        ]
        for flow in ("icfm", "otcfm")
        for width in (8, 16)
    }
    means = {
        place: sum(status["best_val_loss"] for status in some) / 3 for place, some in cells.items()
    }
    seen = seen_in_browser(page)
    by_width = [means["icfm", 8], means["icfm", 16]]
    assert [float(text.partition(" ")[0]) for text in seen["cells"]] == pytest.approx(
        by_width, abs=1e-3
    )
    assert seen["up"] == [text for _, text in sorted(zip(by_width, seen["cells"], strict=True))]
    assert seen["down"] == seen["up"][::-1]
    assert seen["sorted"] == "descending"
    assert seen["widths"] == ["8"] * 6 + ["16"] * 6  # by size, not as words
    assert seen["sizes"] == [2_000_000, 500_000, 1000, 10, -2, "k", "", "-"]
    assert sorted(seen["filtered"]) == [f"otcfm-w8-s{seed}" for seed in range(3)]
    assert (seen["rows"], seen["left"], seen["none"]) == (["8"], "3 of 12 runs", [])
    assert (seen["all"], seen["loaded"]) == (12, [])
    assert len(seen["images"]) == 4
    assert min(seen["images"]) > 0
    # What a reader without JavaScript, or a program, finds.
    text = page.read_text()
    assert len(re.findall("--seed 1 .*--name icfm-w8-s1", text)) == 1
    assert "have another floor" in text
    assert text.count('<path class="band') == 4
    assert seen["paper"] == "rgb(255, 255, 255)"
    dark = seen_in_browser(page, "--blink-settings=preferredColorScheme=0")
    assert dark["paper"] == "rgb(20, 23, 26)"


def test_a_hundred_runs_are_a_small_page(study: Path) -> None:
    for width in range(34):
        for seed in range(3):
            losses = [1 / (epoch + 1) + seed / 100 + width / 30 for epoch in range(200)]
            made_run(study, losses, lr=(width + 1) / 1000, seed=seed, epochs=200)
    assert written().stat().st_size < 150_000


def test_nothing_that_a_run_says_is_taken_for_html(study: Path) -> None:
    evil = "<script>alert(1)</script>"
    made_run(study, [1.0], arch=f"{evil}=nets:Net", group=evil, name="a")
    run = made_run(study, [1.0], "failed", name="b")
    status = json.loads(run.status_file.read_text())
    run.status_file.write_text(json.dumps(status | {"reason": evil}))
    (run.folder / "wandb").mkdir()
    run.wandb_page_file.write_text("javascript:alert(1)")
    made = Run(study, "a")
    (made.folder / "wandb").mkdir()
    made.wandb_page_file.write_text("https://wandb.test/team/project/runs/1?a=1&b=2\n")
    text = written().read_text()
    assert evil not in text
    assert "javascript:" not in text
    assert 'href="https://wandb.test/team/project/runs/1?a=1&amp;b=2"' in text


def test_runs_of_one_name_in_two_studies_are_two_rows(study: Path) -> None:
    folders = [
        made_run(study.with_name(of), [1.0], lr=lr, name="a").folder.relative_to(Path.cwd())
        for of, lr in (("one", 0.001), ("two", 0.002))
    ]
    text = written(*map(str, folders)).read_text()
    linked = re.findall('<a href="#([^"]+)">a<', text)
    rows = re.findall('<tr id="([^"]+)"', text)
    assert sorted(linked) == sorted(rows) == sorted({*rows})
    assert len(rows) == 2
    assert len(re.findall("<code>.*--lr 0.002", text)) == 1


def test_a_page_replaces_the_one_before_whole_and_has_no_samples_where_there_are_none(
    study: Path,
) -> None:
    made_run(study, [1.0], measures={"sliced": 0.1})
    assert "sliced" in written().read_text()
    assert "<h2>Samples" not in written().read_text()
    assert not list(Path().glob(".*tmp"))
