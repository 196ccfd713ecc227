"""One evaluation on one core, on two, and on a Dask cluster whose workers are killed: the same files and scores."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from joblib import parallel_config
from joblib.parallel import get_active_backend

from contsp_core import Crystals
from contsp_core.checkpoints import load_model, save_checkpoint
from contsp_core.csp import evaluation
from contsp_core.csp.evaluation import EvaluationConfig, evaluate_checkpoint, fill_folder
from contsp_core.csp.metrics import run_with_time_limit, spread
from contsp_core.data import load_split
from contsp_core.energy import EnergyConfig
from contsp_core.training import initial_model

TINY = EnergyConfig(width=8, n_conv=1, n_basis=8, cutoff_multiple=1.5, noise_min=0.02, noise_max=1, spectral_norm=False)
N_CRYSTALS = 10
NAP_IN_CHILDREN = """
import sys
from contsp_core.csp.metrics import run_with_time_limit
from test_distributed import nap
run_with_time_limit(nap, [(float(sys.argv[1]),)] * 500, 2, 3.0, progress=False)
"""


def saved(path, config, settings):
    training = load_split("prototypes", "train").crystals.to(torch.float32)
    model = initial_model(training, config, seed=0).eval().requires_grad_(False)
    return save_checkpoint(path, model, {"dataset": "prototypes"} | settings)


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """The paper's energy, with spectral norms, which torch sends to no other process as they are."""
    folder = tmp_path_factory.mktemp("paper")
    return saved(folder / "paper.safetensors", replace(TINY, noise_min=None, noise_max=None, spectral_norm=True), {})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, paper):
    """An energy with noise levels, ranked by the paper's."""
    return saved(tmp_path_factory.mktemp("model") / "tiny.safetensors", TINY, {"judge": str(paper)})


def evaluate(checkpoint, folder, n_jobs=2, **options):
    """Each crystal is a part of its own, so that rounding is the same however the work is spread."""
    options = {"n_structures": N_CRYSTALS, "n_samples": 2, "n_steps": 60, "chunk_atoms": 1} | options
    return evaluate_checkpoint(checkpoint, "prototypes", folder, EvaluationConfig(n_jobs=n_jobs, **options))


@pytest.fixture(scope="module")
def serial(checkpoint, tmp_path_factory):
    """Folder and result of one process."""
    folder = tmp_path_factory.mktemp("serial")
    return folder, evaluate(checkpoint, folder, n_jobs=1)


@pytest.fixture
def written(monkeypatch):
    """How often each crystal was written; ``written.before`` is called before each."""
    counts, write = Counter(), evaluation.write_samples
    counts.before = lambda: None

    def count(folder, name, structures):
        counts.before()
        write(folder, name, structures)
        counts[name] += 1

    monkeypatch.setattr(evaluation, "write_samples", count)
    return counts


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def crystals_in(folder):
    return {path.parent.name for path in folder.glob("*/energies.json")}


def workers_of_this_process():
    return [child for child in psutil.Process().children() if "popen_loky" in " ".join(child.cmdline())]


# Cores


def test_one_process_starts_no_workers_and_two_do(checkpoint, tmp_path, monkeypatch):
    before, made_here, make = psutil.Process().children(), [], evaluation.make_candidates

    def record(*args, **kwargs):
        made_here.append(torch.get_num_threads())
        return make(*args, **kwargs)

    monkeypatch.setattr(evaluation, "make_candidates", record)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    evaluate(checkpoint, tmp_path / "1", 1, n_structures=2, n_steps=1)
    assert made_here == [1, 1]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(n_threads)
    assert set(psutil.Process().children()) <= set(before)
    result = evaluate(checkpoint, tmp_path / "2", 2, n_structures=2, n_steps=1)
    assert len(made_here) == 2
    assert len(workers_of_this_process()) >= 2
    n_atoms = 2 * sum(map(len, result.references.species))
    evaluate(checkpoint, tmp_path / "3", 2, n_structures=2, n_steps=1, chunk_atoms=10 * n_atoms)
    assert len(made_here) == 3, "two workers with less than a 16th of chunk_atoms each are not worth it"


def test_a_gpu_is_used_by_one_process(tmp_path):
    made_by = []

    def make(crystals):
        made_by.append(os.getpid())
        return [(name, [None]) for name, _ in crystals]

    settings = EvaluationConfig(n_samples=1, n_jobs=2, chunk_atoms=1, device="cuda")
    fill_folder(tmp_path, [("a", [1]), ("b", [2])], make, settings)
    assert made_by == [os.getpid()] * 2


def test_two_processes_write_the_bytes_of_one(checkpoint, serial, tmp_path):
    evaluate(checkpoint, tmp_path)
    assert contents(tmp_path) == contents(serial[0])


def test_so_they_do_with_an_energy_that_has_spectral_norms(paper, tmp_path):
    for n_jobs in (1, 2):
        evaluate(paper, tmp_path / str(n_jobs), n_jobs, n_structures=4, n_steps=5)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_the_judge_ranks_samples_and_references(paper, serial):
    judge, result = load_model(paper), serial[1]
    made = [(s.properties["energy"], s) for samples in result.predictions for s in samples if s is not None]
    for energies, structures in (zip(*made), (result.table["reference_energy"], result.references.structures)):
        expected = judge(Crystals.from_structures(structures)).tolist()
        assert list(energies) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_the_size_of_parts_changes_nothing_but_rounding(checkpoint, serial, tmp_path, n_jobs):
    result = evaluate(checkpoint, tmp_path, n_jobs, chunk_atoms=50)
    for own, other in zip(result.predictions, serial[1].predictions, strict=True):
        for first, second in zip(own, other, strict=True):
            assert np.allclose(first.lattice.matrix, second.lattice.matrix, atol=1e-3)
            assert first.properties["energy"] == pytest.approx(second.properties["energy"], abs=1e-4)
    for name, score in serial[1].summary["scores"].items():
        assert result.summary["scores"][name] == pytest.approx(score, abs=1e-3, nan_ok=True), name


def test_templates_come_from_a_library_of_each_process(checkpoint, tmp_path):
    for n_jobs in (1, 2):
        evaluate(checkpoint, tmp_path / str(n_jobs), n_jobs, source="templates", n_structures=4)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_what_was_written_before_an_interruption_is_not_made_again(checkpoint, serial, tmp_path, written, n_jobs):
    def interrupt():
        if len(written) == 3:
            raise KeyboardInterrupt

    written.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, tmp_path, n_jobs)
    assert crystals_in(tmp_path) == set(written)
    written.before = lambda: None
    evaluate(checkpoint, tmp_path, n_jobs=1)
    assert written == Counter(serial[1].references.material_ids)  # each once
    assert contents(tmp_path) == contents(serial[0])


def test_a_worker_that_dies_is_told_in_one_line_and_costs_what_it_was_at(checkpoint, serial, tmp_path, written):
    def kill_a_worker():
        if len(written) == 1:
            workers_of_this_process()[0].kill()

    written.before = kill_a_worker
    with pytest.raises(RuntimeError, match="a worker process died") as error:
        evaluate(checkpoint, tmp_path)
    assert "\n" not in str(error.value)
    assert 2 <= len(written) < N_CRYSTALS
    assert crystals_in(tmp_path) == set(written)
    evaluate(checkpoint, tmp_path, n_jobs=1)
    assert written == Counter(serial[1].references.material_ids)
    assert contents(tmp_path) == contents(serial[0])


def nap(seconds):
    """A long one is not even woken by the death of the parent: it loops in compiled code."""
    if seconds > 1:
        deque(itertools.repeat(0), maxlen=0)
    time.sleep(seconds)


@pytest.mark.parametrize("seconds", [0.1, 60.0])
def test_no_child_outlives_the_process_that_started_it_by_more_than_its_limit(seconds):
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-c", NAP_IN_CHILDREN, str(seconds)]
    parent, children = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}), []
    while len(children) < 2:
        assert parent.poll() is None
        children = psutil.Process(parent.pid).children()
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    assert psutil.wait_procs(children, timeout=10)[1] == []


# A cluster


@pytest.fixture(scope="module")
def cluster():
    """Two worker processes of Dask, as on two machines; this process is their client."""
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def client(cluster):
    """Dask's client; joblib uses the cluster, and after a minute a test is stopped."""

    def stop(*_):
        raise TimeoutError("the run does not end")

    cluster.wait_for_workers(2)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    with parallel_config(backend="dask"):
        yield cluster
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)


def test_a_killed_worker_of_a_cluster_costs_nothing(checkpoint, serial, tmp_path, written, client):
    workers, killed = client.run(os.getpid), []

    def kill_a_busy_worker():
        busy = [address for address, tasks in client.processing().items() if tasks]
        if len(written) >= 2 and busy and not killed:
            killed.append(busy[0])
            os.kill(workers[busy[0]], signal.SIGKILL)

    written.before = kill_a_busy_worker
    result = evaluate(checkpoint, tmp_path)
    assert len(killed) == 1
    assert written == Counter(serial[1].references.material_ids)
    assert result.table.index.tolist() == serial[1].references.material_ids
    assert contents(tmp_path) == contents(serial[0])


def hang_or_die(number, folder, tester):
    """3 loops in compiled code, 5 dies, and 7 kills the worker whose child it is, but only the first time."""
    if number == 3:
        deque(itertools.repeat(0), maxlen=0)
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 7 and os.getppid() != tester and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    return number


def test_calls_that_hang_or_kill_cost_themselves_on_a_cluster_too(tmp_path, client):
    tasks = [(number, tmp_path, os.getpid()) for number in range(20)]
    found = run_with_time_limit(hang_or_die, tasks, time_limit_s=1.0, progress=False)
    assert found == [None if number in (3, 5) else number for number in range(20)]
    assert (tmp_path / "killed").exists()


def own_process(numbers):
    return [os.getpid() for _ in numbers]


def test_a_cluster_of_one_worker_is_one(client, monkeypatch):
    """joblib alone would then do all the work in the calling process."""
    monkeypatch.setattr(type(get_active_backend()[0]), "effective_n_jobs", lambda *_: 1)
    workers = client.run(os.getpid).values()
    assert set(spread(own_process, list(range(4)), [1] * 4, 1, -1, return_as="generator")) <= set(workers)


def kill_the_worker(numbers):
    if 3 in numbers:
        os.kill(os.getpid(), signal.SIGKILL)
    return numbers


def test_a_part_that_kills_its_workers_ends_the_run(client):
    """joblib alone would wait for it for ever."""
    client.cluster.scheduler.allowed_failures = 0
    with pytest.raises(Exception, match="Attempted to run task"):
        list(spread(kill_the_worker, list(range(6)), [1] * 6, 1, -1, return_as="generator"))
