"""The README's first command on a clean checkout: what it makes, what it reruns, and whom it calls."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from ast import literal_eval
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7500)]  # the first of them waits for `make run`

# Runs inside every Python process of the run, DVC's and ours: whoever looks up a host, connects, or sends a datagram is
# written down, and so is which command was watched.
_WATCH = """
import os, sys
def _watch(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
        host = address[0] if isinstance(address, tuple) else "unix"
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    if host not in ("127.0.0.1", "::1", "localhost", "unix", None):
        with open(os.environ["CADX_TEST_CONNECTIONS"], "a") as log:
            log.write(f"{sys.argv[:2]} {event} {host}\\n")
sys.addaudithook(_watch)
with open(os.environ["CADX_TEST_CONNECTIONS"] + ".watched", "a") as log:
    log.write(f"{sys.argv[:2]}\\n")
"""


# A network of its own that holds nothing but the loopback interface, which must be brought up: SIOCSIFFLAGS, IFF_UP.
_CLOSED_NETWORK = ["unshare", "--map-root-user", "--net", sys.executable, "-c", """
import fcntl, os, socket, struct, sys
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh", b"lo", 0x1))
os.execvp(sys.argv[1], sys.argv[1:])
"""]  # fmt: skip


class Checkout:
    """A copy of what git would check out, with the environment of the original."""

    def __init__(self, origin: Path, folder: Path) -> None:
        self.folder = folder / "cadx"
        listing = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"],
            cwd=origin,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in filter(None, listing.stdout.split("\0")):
            if (origin / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(origin / name, self.folder / name)
        subprocess.run(["git", "init", "-q"], cwd=self.folder, check=True)
        watch = folder / "watch"
        watch.mkdir()
        (watch / "sitecustomize.py").write_text(_WATCH)
        self.connections = folder / "connections.log"
        probe = subprocess.run([*_CLOSED_NETWORK, "true"], capture_output=True, check=False)
        self.network = [] if probe.returncode else _CLOSED_NETWORK
        if not self.network:
            warnings.warn(
                "`unshare --net` fails here: the run had an open network. Its Python processes were watched; Java, "
                "which is TorchServe's front end, was NOT.",
                stacklevel=2,
            )
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{self.folder}:{watch}",
            "CADX_TEST_CONNECTIONS": str(self.connections),
            "COLUMNS": "100",
        }
        # The last two: `make test-all` must not speak to the make inside.
        for name in ("CADX_DATA_MIRROR", "OMP_NUM_THREADS", "MAKEFLAGS", "MAKELEVEL"):
            self.environment.pop(name, None)

    def run(self, *command: str) -> str:
        done = subprocess.run(
            [*self.network, *command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=7200,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stderr + done.stdout

    def reproduce(self, *command: str) -> set[str]:
        """Reproduce the phantom experiment, by `make` or by another command; the stages that ran."""
        said = self.run(*command) if command else self.make("reproduce", "EXPERIMENT=phantom-xray")
        return set(re.findall(r"Running stage '(\w+)", said))

    def make(self, *words: str) -> str:
        """Run a target with the environment that stands already."""
        return self.run("make", "--no-print-directory", *words, f"VENV={sys.prefix}")

    def report(self, name: str) -> Any:
        """What a JSON file of the phantom's reports holds."""
        return json.loads((self.folder / "data/reports/phantom-xray" / name).read_text())


@pytest.fixture(scope="module")
def checkout(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    made = Checkout(root, tmp_path_factory.mktemp("clean"))
    started = time.monotonic()
    made.output = made.make("run")
    made.minutes = (time.monotonic() - started) / 60
    print(f"make run: {made.minutes:.1f} minutes")
    return made


def test_the_main_job_ends_in_one_page_that_stands_alone(checkout: Checkout) -> None:
    page = (checkout.folder / "data/reports/phantom-xray/index.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page)
    assert page.count("<img") + page.count("<svg") > 10
    assert len(page) < 5_000_000
    *_, where, what_next = checkout.output.splitlines()
    assert where.split() == ["open", "data/reports/phantom-xray/index.html"]
    assert what_next.startswith("next ")


def test_the_model_was_served_as_it_was_evaluated(checkout: Checkout) -> None:
    deployment, rehearsal = (
        checkout.report("serving/deployment.json"),
        checkout.report("serving/rehearsal.json"),
    )
    assert deployment["largest_difference"] <= 1e-5
    assert deployment["golden_samples"] >= 32
    assert rehearsal["answered"] == 400
    assert not (checkout.folder / "data/work/phantom-xray/torchserve/key_file.json").exists(), "stopped"


def test_a_model_with_too_little_evidence_was_refused_with_the_reason(checkout: Checkout) -> None:
    refused = json.loads((checkout.folder / "data/reports/phantom-xray-pilot/0/decision.json").read_text())
    assert not refused["promote"]
    assert "beyond the floor" in refused["reasons"][0]
    assert refused["reasons"][0] in " ".join(checkout.output.split())
    page = (checkout.folder / "data/reports/phantom-xray/index.html").read_text()
    assert refused["reasons"][0] in page


def test_the_watch_is_calm_about_the_same_patients_and_notices_an_aged_detector(checkout: Checkout) -> None:
    same, aged = checkout.report("serving/rehearsal.json")["watches"]
    assert same["drifted"] is False, same["said"]
    assert aged["drifted"] is True
    assert "sharpness" in aged["said"]


def test_the_results_page_holds_the_experiment(checkout: Checkout) -> None:
    checkout.run("cadx", "results")
    page = (checkout.folder / "docs/results.md").read_text()
    metrics = json.loads((checkout.folder / "data/reports/phantom-xray/metrics.json").read_text())["metrics"]
    assert (
        f"{metrics['auc']['value']:.3f} ({metrics['auc']['low']:.3f} to {metrics['auc']['high']:.3f})"
        in page.replace("&nbsp;", " ")
    )


def test_nothing_was_asked_of_any_other_machine(checkout: Checkout) -> None:
    assert not checkout.connections.exists(), checkout.connections.read_text()
    watched = checkout.connections.with_name(f"{checkout.connections.name}.watched").read_text()
    started = [[*literal_eval(line), ""] for line in watched.splitlines()]
    commands = {words[1] for words in started if Path(words[0]).name == "cadx"}
    stages = yaml.safe_load((checkout.folder / "dvc.yaml").read_text())["stages"]
    # The gate runs only where other numbers come out than those that are committed with its decision.
    expected = {stage["cmd"].split()[1] for name, stage in stages.items() if name != "gate"}
    expected |= {"rehearse", "show"}
    assert expected <= commands, f"not watched: {expected - commands}"
    assert any(Path(words[0]).name == "dvc" for words in started)


def test_the_phantom_is_found_and_every_number_has_its_interval(checkout: Checkout) -> None:
    metrics = json.loads((checkout.folder / "data/reports/phantom-xray/metrics.json").read_text())
    assert metrics["clustered"] is True
    for name, estimate in metrics["metrics"].items():
        assert estimate["low"] <= estimate["value"] <= estimate["high"], name
    assert metrics["metrics"]["auc"]["low"] > 0.8
    assert metrics["metrics"]["sensitivity"]["n"] >= 60, "positives of the test split"
    uses = (checkout.folder / "data/reports/phantom-xray/test_uses.jsonl").read_text().splitlines()
    assert {json.loads(line)["seed"] for line in uses} == {0, 1, 2}


def test_a_second_run_runs_nothing_and_a_change_only_what_depends_on_it(checkout: Checkout) -> None:
    assert checkout.reproduce() == set()

    step = checkout.folder / "components/summarise.py"
    step.write_text(step.read_text() + "\n# An edit.\n")
    assert checkout.reproduce() == {"code", "summarise"}

    params = checkout.folder / "params.yaml"
    params.write_text(params.read_text().replace("sensitivity: 0.95", "sensitivity: 0.9", 1))
    one_seed = checkout.reproduce("env", "DVC_NO_ANALYTICS=1", "dvc", "repro", "package@phantom-xray-0")
    assert one_seed == {"calibrate", "evaluate", "gate", "package"}


def test_a_folder_of_ones_own_images_is_one_command_away_from_the_same_chain(checkout: Checkout) -> None:
    """Bright and dark squares, a folder per class; small and for one epoch, since the chain is what counts."""
    rng = np.random.default_rng(0)
    for name, level in (("clear", 60), ("squares", 180)):
        (checkout.folder.parent / "mine" / name).mkdir(parents=True)
        for number in range(80 if name == "clear" else 40):
            pixels = rng.normal(level, 30, (40, 40)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(checkout.folder.parent / "mine" / name / f"{number}.png")
    said = checkout.run("cadx", "new", str(checkout.folder.parent / "mine"))
    assert said.splitlines()[-1].strip() == "make reproduce EXPERIMENT=mine"
    params = checkout.folder / "params.yaml"
    text = params.read_text()
    start = text.index("\nmine:")
    small = text[start:].replace("height_px: 224", "height_px: 32").replace("width_px: 224", "width_px: 32")
    params.write_text(text[:start] + small.replace("\n    epochs: 40\n", "\n    epochs: 1\n", 1))
    said = checkout.make("reproduce", "EXPERIMENT=mine")
    assert "mine, val split, 3 seeds" in said
    assert "scored on the val split" in " ".join(said.split()), "the gate asks for test"
    assert (checkout.folder / "data/reports/mine/index.html").is_file()
