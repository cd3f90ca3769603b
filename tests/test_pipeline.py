"What crosses stages and processes: the whole run under papermill, kill and resume, torchrun, and what bad input gets."
import json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = "dataset tokenizer base eval_base mid eval_mid sft eval_sft rl eval_rl report".split()


def environment(home):
    return os.environ | dict(NANOCHAT_HOME=str(home), OMP_NUM_THREADS="1")  # two test files run at a time


def speedrun(home, run, *words):
    "The command that runs the speedrun notebook at the smallest profile"
    Path(home, "runs", run).mkdir(parents=True, exist_ok=True)
    return [sys.executable, "-m", "papermill", "speedrun.ipynb", str(Path(home, "runs", run, "speedrun.ipynb")), "-p", "profile", "tiny", "-p", "run", run,
            "--log-output", "--no-progress-bar", "--kernel", "python3", *words]


def stage(home, module, *words, run="run", profile="tiny"):
    "Run one stage as a command"
    command = [sys.executable, "-m", f"nanochat.{module}", "--run", run, "--profile", profile, *words]
    return subprocess.run(command, cwd=ROOT, env=environment(home), capture_output=True, text=True)


def kill_all(home):
    "kill -9 for every process that works in this home: the kernel is in a session of its own"
    for process in psutil.process_iter():
        try:
            if process.environ().get("NANOCHAT_HOME") == str(home): process.kill()
        except psutil.Error: continue


def records(home, run):
    return {p.stem: json.loads(p.read_text()) for p in Path(home, "runs", run, "stages").glob("*.json")}


def weights(home, run, name):
    from safetensors.numpy import load_file
    return load_file(sorted(Path(home, "runs", run, name).glob("step_*"))[-1] / "model.safetensors")


def assert_one_line(done, *parts):
    "Exit status 2 and one line that says what is wrong"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and lines[0].startswith("nanochat: error: "), done.stderr
    for part in parts: assert part in lines[0], lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A home with one complete tiny run, made by the notebook"
    home = tmp_path_factory.mktemp("home")
    done = subprocess.run(speedrun(home, "run"), cwd=ROOT, env=environment(home), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return home


@pytest.fixture
def copy(finished, tmp_path):
    "A copy of the complete run that may be damaged"
    shutil.copytree(finished, tmp_path / "home", symlinks=True)
    run_json = tmp_path / "home/runs/run/run.json"
    run_json.write_text(run_json.read_text().replace(str(finished), str(tmp_path / "home")))
    return tmp_path / "home"


def test_speedrun_goes_through_every_stage_and_leaves_a_report(finished):
    folder = Path(finished, "runs/run")
    assert sorted(records(finished, "run")) == sorted(STAGES)
    report = (folder / "report.md").read_text()
    for word in ("BASE", "MID", "SFT", "RL", "GSM8K"): assert word in report
    assert (folder / "report.html").read_text().lower().startswith("<!doctype html")
    notebook = json.loads((folder / "speedrun.ipynb").read_text())
    outputs = sum(len("".join(o.get("text", ""))) for c in notebook["cells"] if c["cell_type"] == "code" for o in c["outputs"])
    assert outputs < 100_000, "the stored notebook is full of progress lines"


def test_the_stream_of_measurements_tells_of_every_stage(finished):
    for name in STAGES[:-1]: assert len(measured(finished, name, "seconds")) == 1 and measured(finished, name, "seconds")[0] > 0, name
    for name in ("base", "mid", "sft", "rl"):
        for measure in ("loss", "lr", "lr_matrices", "lr_embedding", "grad_norm", "tok_per_sec", "memory_gb", "train_seconds"): assert measured(finished, name, measure), (name, measure)
    assert measured(finished, "eval_base", "val_bpb") and measured(finished, "eval_sft", "chatcore")
    report = Path(finished, "runs/run/report.md").read_text()
    for label in ("length of the gradient", "learning rate of the group matrices", "validation bits per byte", "validation loss", "mean reward"): assert label in report, label
    assert "would take about" in report  # the next goal, on this machine


def test_a_second_run_skips_every_complete_stage(finished):
    before = records(finished, "run")
    done = subprocess.run(speedrun(finished, "run"), cwd=ROOT, env=environment(finished), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    after = records(finished, "run")
    for name in set(STAGES) - {"report"}: assert after[name] == before[name], name


def test_kill_9_at_any_moment_and_the_same_command_finish_with_the_same_weights(finished, tmp_path):
    seconds = sum(r["seconds"] for r in records(finished, "run").values()) + 25
    kept, rng = {}, random.Random(os.environ.get("KILL_SEED"))
    for _ in range(2):
        process = subprocess.Popen(speedrun(tmp_path, "run"), cwd=ROOT, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(rng.uniform(8, seconds * 0.6))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kill_all(tmp_path)
        for name, record in records(tmp_path, "run").items(): kept.setdefault(name, record)
    done = subprocess.run(speedrun(tmp_path, "run"), cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, record in kept.items():
        if name != "report": assert records(tmp_path, "run")[name] == record, f"stage {name} was run twice"
    for name in ("base", "mid", "sft", "rl"):
        mine, theirs = weights(tmp_path, "run", name), weights(finished, "run", name)
        assert all((mine[k] == theirs[k]).all() for k in theirs), f"the weights of {name} differ after a kill"


def test_a_failing_stage_fails_the_run_with_its_own_message(copy):
    shutil.rmtree(copy / "runs/run/mid")
    for name in ("eval_mid", "sft", "eval_sft", "rl", "eval_rl"): (copy / f"runs/run/stages/{name}.json").unlink()
    done = subprocess.run(speedrun(copy, "run"), cwd=ROOT, env=environment(copy), capture_output=True, text=True)
    assert done.returncode != 0
    assert "no whole checkpoint of stage mid" in done.stderr


def losses(home, run="run"):
    return [json.loads(l)["loss"] for l in Path(home, "runs", run, "metrics.jsonl").read_text().splitlines() if '"loss"' in l]


def measured(home, stage, name, run="run"):
    return [line[name] for text in Path(home, "runs", run, "metrics.jsonl").read_text().splitlines() if (line := json.loads(text))["stage"] == stage and line.get(name) is not None]


def before_base(finished, home):
    "A home with what a run has before its first training"
    shutil.copytree(finished / "data", home / "data")
    shutil.copytree(finished / "runs/run/tokenizer", home / "runs/run/tokenizer")
    (home / "runs/run/stages").mkdir()
    for name in ("dataset", "tokenizer"): shutil.copy(finished / f"runs/run/stages/{name}.json", home / "runs/run/stages")
    shutil.copy(finished / "runs/run/run.json", home / "runs/run/run.json")
    return home


@pytest.mark.slow
def test_a_process_that_dies_ends_the_stage_with_one_line_and_the_same_command_goes_on(finished, tmp_path):
    home = before_base(finished, tmp_path / "home")
    script = "from nanochat.common import launch; launch('pretrain', 'run', 'tiny', 2, steps=60, save_every=5, compile=False)"
    def start(): return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first, deadline = start(), time.time() + 120
    while not list((home / "runs/run/base").glob("step_*/state.json")): assert time.time() < deadline and first.poll() is None; time.sleep(.05)
    [second] = [p for p in psutil.Process(first.pid).children(recursive=True) if p.environ().get("LOCAL_RANK") == "1"]
    second.kill()
    out, _ = first.communicate(timeout=60)
    assert out.strip().splitlines()[-1].endswith("process 1 of stage pretrain was ended by signal 9 (SIGKILL, which is often the end of the memory); the same command again goes on from the last checkpoint")
    assert "Root Cause" not in out
    again = start()
    out, _ = again.communicate(timeout=240)
    assert again.returncode == 0 and "base: continues from step" in out, out[-2000:]


def test_two_processes_have_the_loss_curve_of_one(finished, tmp_path):
    curves = []
    for nproc in (1, 2):
        home = before_base(finished, tmp_path / str(nproc))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}", "-m", "--", "nanochat.pretrain", "--run", "run", "--profile", "tiny",
                   "--dtype", "float32", "--steps", "25"]
        done = subprocess.run(command, cwd=ROOT, env=environment(home) | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        curves.append(losses(home))
    assert len(curves[0]) == len(curves[1]) == 25
    assert max(abs(a - b) for a, b in zip(*curves)) < 1e-3
    norms = [measured(tmp_path / str(nproc), "base", "grad_norm") for nproc in (1, 2)]
    assert len(norms[0]) == len(norms[1]) == 25
    for one, two in zip(*norms): assert two == pytest.approx(one, rel=0.01)  # each process holds a part of the gradient: the length is that of the whole


def test_an_unknown_profile_is_refused_in_one_line(tmp_path):
    assert_one_line(stage(tmp_path, "dataset", profile="enormous"), "enormous", "tiny")


def test_an_unknown_device_is_refused_in_one_line(finished):
    assert_one_line(stage(finished, "pretrain", "--device", "abacus", run="run"), "abacus")


def test_a_stage_without_the_one_before_is_refused_in_one_line(tmp_path):
    assert_one_line(stage(tmp_path, "midtrain"), "needs stage base")


def test_a_missing_checkpoint_is_named_in_one_line(copy):
    shutil.rmtree(copy / "runs/run/base")
    (copy / "runs/run/stages/mid.json").unlink()
    assert_one_line(stage(copy, "midtrain"), "base")


def test_a_corrupt_shard_is_named_in_one_line(copy):
    shard = sorted(Path(copy, "data").rglob("shard_00000.parquet"))[0]
    shard.write_bytes(shard.read_bytes()[:5000])
    for name in ("base", "dataset"): (copy / f"runs/run/stages/{name}.json").unlink()
    shutil.rmtree(copy / "runs/run/base")
    assert_one_line(stage(copy, "dataset"), "shard_00000.parquet")


def test_a_batch_that_does_not_divide_is_refused_in_one_line(copy):
    (copy / "runs/run/stages/base.json").unlink()
    shutil.rmtree(copy / "runs/run/base")
    assert_one_line(stage(copy, "pretrain", "--total-batch-size", "3000"), "not a multiple")


def test_two_processes_on_one_run_the_second_is_refused(copy):
    from nanochat.common import Run
    os.environ["NANOCHAT_HOME"] = str(copy)
    try:
        with Run.open("run").lock(): assert_one_line(stage(copy, "pretrain"), "in use by process")
    finally: del os.environ["NANOCHAT_HOME"]


# --- several machines ------------------------------------------------------------------------------------------------

@pytest.fixture
def two_nodes():
    "Two network namespaces of this machine, joined by a wire: their names, their addresses"
    tag = f"nc{os.getpid() % 10_000}"
    names, addresses = [f"{tag}a", f"{tag}b"], ["10.213.7.1", "10.213.7.2"]
    def ip(*words): return subprocess.run(["ip", *words], capture_output=True, text=True)
    if not shutil.which("ip") or ip("netns", "add", names[0]).returncode: pytest.skip("network namespaces need root and the command ip")
    try:
        ip("netns", "add", names[1])
        made = ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        if made.returncode: pytest.skip(f"no virtual network here: {made.stderr.strip()}")
        for name, address in zip(names, addresses):
            for words in (["addr", "add", f"{address}/24", "dev", name], ["link", "set", name, "up"], ["link", "set", "lo", "up"]): ip("-n", name, *words)
        yield names, addresses
    finally:
        for name in names: ip("netns", "del", name)


def test_two_nodes_in_two_network_namespaces_have_the_loss_curve_of_one(finished, tmp_path, two_nodes):
    names, addresses = two_nodes
    homes = [before_base(finished, tmp_path / name) for name in ("one", "two")]
    script = "from nanochat.common import launch; launch('pretrain', 'run', 'tiny', 1, dtype='float32', steps=15)"
    def start(home, node, **more):
        inside = ["ip", "netns", "exec", names[node]] if more else []
        return subprocess.Popen([*inside, sys.executable, "-c", script], cwd=ROOT, env=environment(home) | dict(OMP_NUM_THREADS="1") | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    pair = [start(homes[1], node, NNODES="2", NODE_RANK=str(node), MASTER_ADDR=addresses[0], GLOO_SOCKET_IFNAME=names[node]) for node in range(2)]
    for process in [*pair, start(homes[0], 0)]:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out[-3000:]
    assert len(losses(homes[0])) == len(losses(homes[1])) == 15
    assert max(abs(a - b) for a, b in zip(losses(homes[0]), losses(homes[1]))) < 1e-3
    assert records(homes[1], "run")["base"]["processes"] == 2
