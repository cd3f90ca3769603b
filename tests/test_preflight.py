"What a run will take is known before it starts, and what would stop it hours later is said in one line."
import http.server, json, os, re, subprocess, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import yaml

from nanochat import preflight as pf
from nanochat.common import NanochatError, Run, list_profiles, load_profile
from nanochat.preflight import check_hub, data_place, missing_files, plan_run, preflight

ROOT = Path(__file__).resolve().parent.parent
plan_goals = pf.plan_goals


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    "Nothing is on this machine yet"
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "home"))
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "NNODES", "TORCHINDUCTOR_CACHE_DIR"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pf, "plan_goals", lambda *given: {})  # seconds that one test needs


def profile_file(tmp_path, name, change):
    "A copy of a profile with a planted fault"
    profile = yaml.safe_load((ROOT / "profiles" / f"{name}.yaml").read_text())
    change(profile)
    path = tmp_path / "planted.yaml"
    path.write_text(yaml.safe_dump(profile, allow_unicode=True))
    return str(path)


def planted(*given, **named):
    "The line that refuses a run"
    with pytest.raises(NanochatError) as refused: preflight(*given, **named)
    line = str(refused.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("profile, hours, parameters", [("speedrun", 231 / 60, 560_988_160), ("d26", 12, 1_081_999_360), ("d30", 24, 1_578_762_240), ("modern", None, None)])
def test_the_dry_run_of_a_large_profile_passes_and_gives_the_published_hours(profile, hours, parameters):
    start = time.thread_time()
    estimate = preflight(profile, dry_run=True)
    assert time.thread_time() - start < 120
    assert [plan.stage for plan in estimate.plans] == "dataset tokenizer base eval_base mid eval_mid sft eval_sft rl eval_rl report".split()
    if hours:
        assert 0.8 < estimate.minutes / 60 / hours < 1.25
        assert next(plan for plan in estimate.plans if plan.stage == "base").memory["weights"] == 4 * parameters
    assert "×H100" in repr(estimate) and "45%" in repr(estimate)


@pytest.mark.parametrize("profile", list_profiles())
def test_the_dry_run_of_every_profile_says_time_memory_disk_and_cost(profile):
    estimate, about = preflight(profile, dry_run=True), load_profile(profile)["about"]
    last = repr(estimate).splitlines()[-1]
    time, unit, memory, gb, disk, also_gb, *dollars = last.split()[1:]
    assert last.startswith("all ") and unit in ("min", "h") and gb == also_gb == "GB" and float(time.replace(",", "")) > 0
    assert 0 < float(memory) <= about["memory_gb"] and 0 < float(disk) <= about["disk_gb"]
    assert 0.4 < estimate.minutes / about["minutes"] < 1.8
    if "hourly_usd" in about: assert float(dollars[0]) == pytest.approx(estimate.minutes / 60 * about["hourly_usd"], abs=0.01)
    else: assert not dollars and not estimate.dollars


def test_the_dry_run_of_d20_has_the_published_figures():
    estimate = preflight("speedrun", dry_run=True)
    base = next(plan for plan in estimate.plans if plan.stage == "base")
    assert (base.steps, base.tokens) == (21_400, 11_219_763_200)
    assert 3.5 < estimate.minutes / 60 < 4.5 and 80 < estimate.dollars < 110 and estimate.machine.hourly == 24


FAULTS = {
    "one shard too few": ({"dataset": {"shards": 215}}, "215 shards", "dataset.shards to 216"),
    "a batch that does not divide": ({"base": {"total_batch_size": 600_000}}, "base: total_batch_size 600000: not a multiple", "change batch_size or total_batch_size"),
    "a batch of finetuning that does not divide": ({"sft": {"examples_per_step": 36}}, "sft: examples_per_step 36: not a multiple"),
    "a batch of tries that does not divide": ({"rl": {"batch_size": 24}}, "rl: examples_per_step 16", "not a multiple of 24 rows"),
    "too little memory": ({"base": {"batch_size": 64, "total_batch_size": 2**20}}, "memory: stage base", "base.batch_size to 32"),
    "an unknown option": ({"sft": {"stepz": 3}}, "sft", "--stepz"),
    "a value of the wrong type": ({"base": {"depth": "deep"}}, "--depth", "'deep' is not a valid int"),
    "a shared option that no stage has": ({"all": {"sede": 3}}, "'sede'"),
    "an unknown task": ({"mid": {"mixture": {"SmallTalk": 10}}}, "mid", "'SmallTalk'"),
    "a model that does not split into heads": ({"base": {"n_head": 7}}, "base", "7 heads"),
    "a shape that the optimizers refuse": ({"base": {"overrides": {"vocab": 3}}}, "overrides: no field 'vocab'"),
    "an unknown corpus": ({"dataset": {"corpus": "webtext"}}, "webtext"),
}

@pytest.mark.parametrize("fault", FAULTS)
def test_a_dry_run_catches(fault):
    options, *words = FAULTS[fault]
    line = planted("speedrun", options=options, dry_run=True)
    for word in words: assert word in line, line


def test_a_dry_run_catches_an_unknown_option_and_a_wrong_type_in_the_profile_itself(tmp_path):
    def misspelt(profile): profile["stages"]["rl"]["example_per_step"] = 16
    def untyped(profile): profile["stages"]["mid"]["batch_size"] = [32]
    assert "'example_per_step' of stage rl: unknown" in planted(profile_file(tmp_path, "speedrun", misspelt), dry_run=True)
    assert "'batch_size' of stage mid: [32] is no int" in planted(profile_file(tmp_path, "speedrun", untyped), dry_run=True)


def test_a_dry_run_holds_the_profile_to_its_own_disk_and_memory(tmp_path):
    line = planted(profile_file(tmp_path, "speedrun", lambda profile: profile["about"].update(disk_gb=40)), dry_run=True)
    assert line.startswith("disk: the run needs") and "there are 40.0" in line
    line = planted(profile_file(tmp_path, "speedrun", lambda profile: profile["about"].update(memory_gb=40)), dry_run=True)
    assert "memory: stage base" in line and "base.batch_size to 16" in line


def test_too_little_disk_or_memory_on_this_machine_stops_the_run():
    with mock.patch("shutil.disk_usage", lambda folder: SimpleNamespace(free=10**6)): assert planted("tiny", "run").startswith("disk: the run needs")
    with mock.patch("psutil.virtual_memory", lambda: SimpleNamespace(available=5 * 10**8, total=10**9)): assert planted("tiny", "run").startswith("memory: stage base needs")


def test_a_hub_that_does_not_answer_stops_a_run_whose_data_is_not_here(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    line = planted("laptop", "run")
    assert line.startswith("hub: http://127.0.0.1:9 does not answer") and "shard_00000.parquet is not here" in line


def test_the_hub_is_asked_at_hf_endpoint_and_a_refusal_counts_as_an_answer(monkeypatch):
    asked = []
    class Mirror(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self): asked.append(self.path); self.send_response(401); self.end_headers()
        def log_message(self, *words): pass
    server = http.server.HTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    try: check_hub(["owner/name/shard_00000.parquet"])
    finally: server.shutdown()
    assert asked == ["/api/datasets/owner/name"]


def test_the_hub_is_not_asked_for_what_is_here(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    values = dict(data="hub", corpus="fineweb-edu", shards=1)
    root = data_place(values)[0]
    names = [f"karpathy/fineweb-edu-100b-shuffle/shard_{i:05d}.parquet" for i in (0, 1822)]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("text")
    manifest = dict(files={name: dict(bytes=4) for name in names}, complete={f"{repo}:{pattern}": [] for repo, pattern in pf.TASK_FILES.items()})
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert missing_files(values, root) == []
    check_hub(missing_files(values, root))
    (root / names[0]).write_text("cut")
    assert missing_files(values, root) == names[:1]


def test_a_folder_that_cannot_be_written_stops_the_run(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "file"))
    assert "cannot be written (Not a directory); set NANOCHAT_HOME" in planted("tiny", "run")


@pytest.mark.parametrize("profile, folder", [("tiny", "data"), ("laptop", "data/hub"), ("tiny", "compiled")])
def test_every_folder_that_a_run_writes_into_is_tried(profile, folder, tmp_path):
    path = tmp_path / "home" / folder
    path.parent.mkdir(parents=True)
    path.write_text("")
    line = planted(profile, "run")
    assert line.startswith(str(path)) and "cannot be written" in line and line.endswith("set NANOCHAT_HOME to a folder of your own")


def test_a_folder_for_compiled_models_that_cannot_be_written_is_called_by_its_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file/compiled"))
    assert planted("tiny", "run").endswith("set TORCHINDUCTOR_CACHE_DIR to a folder of your own")
    assert not list((tmp_path / "home").rglob(".preflight"))  # what was tried leaves nothing


def test_the_gpu_with_the_least_free_memory_decides(monkeypatch):
    free = [80e9, 30e9, 79e9]
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda i: (int(free[i]), 85 * 10**9))
    assert pf.free_memory("cuda", 3)[0] == 30e9 and pf.free_memory("cuda", 1)[0] == 80e9
    estimate = preflight("speedrun", dry_run=True)
    estimate.machine.memory, estimate.machine.tightest = pf.free_memory("cuda", 3)
    with pytest.raises(NanochatError, match="there are 30.0 free on GPU 1, which has 85.0; set base.batch_size to 8"): pf.check_memory(estimate)


# --- processes that work together ------------------------------------------------------------------------------------

def test_two_processes_meet_and_add_up():
    pf.check_group(2, "cpu")
    pf.check_group(1, "abacus")  # one alone has nobody to meet


def test_a_process_that_never_comes_is_named_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import os, time\nif os.environ.get('RANK') == '1': time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    start = time.time()
    with pytest.raises(NanochatError) as refused: pf.check_group(2, "cpu", 3.0)
    assert str(refused.value) == "processes: 2 cannot work together (process 1 did not come within 3 s); use -p nproc 1"
    assert time.time() - start < 60


def test_a_machine_that_never_comes_is_missed_and_nothing_goes_on_waiting(monkeypatch):
    import psutil
    monkeypatch.setattr(pf, "STARTS", 10.0)
    for name, value in dict(NNODES="2", NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29517").items(): monkeypatch.setenv(name, value)
    before = psutil.Process().children(recursive=True)   # of other tests
    with pytest.raises(NanochatError, match=r"^processes: 2 cannot work together \(no word from all 2 machines within 11 s\); start the run on every machine") as refused: pf.check_group(1, "cpu", 0.5)
    assert "\n" not in str(refused.value) and set(psutil.Process().children(recursive=True)) <= set(before)


def test_a_network_that_is_not_there_is_told_in_one_line(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    with pytest.raises(NanochatError, match="Unable to find address for: nosuch0") as refused: pf.check_group(2, "cpu", 5.0)
    assert "\n" not in str(refused.value) and "third_party" not in str(refused.value)


def test_a_run_of_several_processes_is_stopped_where_they_do_not_meet(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    assert planted("tiny", "run", nproc=2).startswith("processes: 2 cannot work together")


def test_more_processes_than_the_machine_has_stop_the_run(): assert "nproc 512: this machine has" in planted("kindergarten", "run", nproc=512, options={"base": {"total_batch_size": 2**22}, "mid": {"total_batch_size": 2**22}, "sft": {"examples_per_step": 512, "batch_size": 1}, "rl": {"examples_per_step": 512}})


def test_a_torch_that_cannot_use_the_gpu_stops_the_run():
    with mock.patch("shutil.which", lambda name: "/usr/bin/" + name), mock.patch("torch.cuda.is_available", lambda: False):
        assert "cannot use this machine's GPU" in planted("gpu1", "run")


def test_a_missing_rust_trainer_stops_a_run_with_much_text_only():
    with mock.patch("nanochat.tokenizer.rustbpe", None):
        assert preflight("tiny", "run").minutes > 0
        with mock.patch.object(pf, "check_processes", lambda *given: None): assert planted("laptop", "run").startswith("rustbpe is missing, and 200 million")


def test_a_data_folder_that_lacks_a_task_stops_the_run(tmp_path):
    (tmp_path / "own").mkdir()
    assert "task SmolTalk" in planted("realdata", "run", options={"dataset": {"data": str(tmp_path / "own")}})


def test_the_estimate_follows_from_what_was_measured():
    def estimate(seconds, steps=1100):
        with mock.patch.object(pf, "matmul_flops", lambda *given: 1e12), mock.patch.object(pf, "measure_model", lambda *given: (seconds, 0.01)):
            result = preflight("kindergarten", "run", options={"base": {"steps": steps}})
        return result.seconds[2] - pf.START - result.machine.compile, result
    slow, fast = estimate(0.4), estimate(0.2)
    assert slow[0] == pytest.approx(2 * fast[0])
    assert fast[1].minutes < slow[1].minutes < 2 * fast[1].minutes
    assert estimate(0.2, 2200)[0] == pytest.approx(2 * fast[0], rel=0.02)
    assert fast[0] == pytest.approx(1100 * 0.2 / pf.EAGER, rel=0.1)


def test_this_machine_is_measured_within_seconds():
    start = time.thread_time()
    about = preflight("kindergarten", "run").machine.about
    assert "this machine: measured steps of the model at" in about or "measured products" in about
    assert time.thread_time() - start < 15


def test_the_plan_of_the_default_run_is_what_its_recorded_run_did():
    cells = [cell for cell in json.loads((ROOT / "speedrun.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    printed = {"".join(cell["source"]): "".join("".join(out.get("text", "")) for out in cell["outputs"]) for cell in cells}
    plans = {plan.stage: plan for plan in plan_run("kindergarten")[0]}
    assert f"{plans['base'].memory['weights'] // 4:,} parameters, {plans['base'].steps:,} steps of {plans['base'].tokens // plans['base'].steps:,} tokens" in printed['stage("pretrain")']
    for module, stage in (("midtrain", "mid"), ("sft", "sft"), ("grpo", "rl")): assert f"{stage} {plans[stage].steps}/{plans[stage].steps} " in printed[f'stage("{module}")']
    took = sum(float(re.findall(r"\[([\d.]+) min\]", text)[-1]) for source, text in printed.items() if source.startswith("stage("))
    estimate = next("".join(out["data"]["text/plain"]) for cell in cells if "".join(cell["source"]).startswith("preflight(") for out in cell["outputs"])
    assert f" {plans['base'].steps:,} " in re.search("^base .*", estimate, re.MULTILINE)[0]
    assert 0.7 < float(re.search(r"^all +([\d.]+) min", estimate, re.MULTILINE)[1]) / took < 1.3  # said on the machine that then ran it: another's speed is no matter of this test


def test_the_price_and_what_the_published_models_would_take_here_are_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(pf, "plan_goals", plan_goals)
    preflight(profile_file(tmp_path, "tiny", lambda profile: profile["about"].update(hourly_usd=3)), "run")
    info = Run("run").info
    assert info["hourly_usd"] == 3 and 0 < info["goals"]["d20"] < info["goals"]["d26"] < info["goals"]["d30"]
    estimate = preflight("speedrun", dry_run=True)
    machine = pf.profile_machine("speedrun", 8, 20)
    assert plan_goals(machine, 20, 8)["d20"] == pytest.approx(sum(estimate.seconds), rel=0.01)  # d20 on the machine it is made for
    assert plan_goals(pf.replace(machine, flops=machine.flops / 2), 20, 8)["d20"] > 1.8 * sum(estimate.seconds)
    noted = info["goals"]
    preflight("tiny", "run")
    assert Run("run").info["goals"] == noted and "hourly_usd" not in Run.create("free").info  # what was said first stays


def test_complete_stages_cost_nothing_more():
    whole = preflight("tiny", "run")
    run = Run.create("run")
    for stage in ("dataset", "tokenizer", "base"): run.write_json({}, "stages", f"{stage}.json")
    run.path("stages", "mid.seconds").write_text("7.0")  # begun, and stopped
    run.update_info(estimate=run.info["estimate"] | dict(base=1.0, mid=2.0, sft=3.0))
    rest, noted = preflight("tiny", "run"), run.info["estimate"]
    assert set(noted) == {plan.stage for plan in whole.plans}
    assert (noted["base"], noted["mid"]) == (1.0, 2.0) and noted["sft"] != 3.0  # what was said before a stage began stays
    assert rest.seconds[:3] == [0, 0, 0] and rest.disk < whole.disk and "done" in repr(rest)


def test_a_dry_run_of_the_notebook_starts_no_stage(tmp_path):
    out = tmp_path / "out.ipynb"
    done = subprocess.run([sys.executable, "-m", "papermill", "speedrun.ipynb", str(out), "-p", "profile", "d26", "-p", "dry_run", "True", "--no-progress-bar", "--kernel", "python3"],
                          cwd=ROOT, env=os.environ | dict(NANOCHAT_HOME=str(tmp_path / "home")), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    text = out.read_text()
    assert "41,275" in text and "$ python" not in text and not (tmp_path / "home").exists()


def test_the_doctor_tells_what_a_report_needs_and_no_secret(tmp_path):
    environment = os.environ | dict(NANOCHAT_HOME=str(tmp_path / "home"), HF_TOKEN="hf_secret", HOME=str(tmp_path))
    def ask(*words): return subprocess.run([sys.executable, "-m", "nanochat", *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    Run.create("half").log("base", 40, loss=2.0)
    done = ask("doctor")
    assert done.returncode == 0, done.stderr
    for word in ("torch ", "rustbpe ", "memory: ", "disk: ", "~/home", "half: no stage complete; last measurement: base step 40", "HF_TOKEN"): assert word in done.stdout, done.stdout
    assert "hf_secret" not in done.stdout and str(tmp_path) not in done.stdout
    refused = ask("surgeon")
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1


def test_several_machines_share_a_step(monkeypatch):
    alone = preflight("speedrun", dry_run=True)
    monkeypatch.setenv("NNODES", "2")
    assert "NODE_RANK is not set" in planted("speedrun", dry_run=True)
    for name, value in dict(NODE_RANK="0", MASTER_ADDR="127.0.0.1").items(): monkeypatch.setenv(name, value)
    both = preflight("speedrun", dry_run=True, options={"base": {"batch_size": 16}, "mid": {"batch_size": 16}})
    assert both.seconds[2] < 0.6 * alone.seconds[2] and both.machine.hourly == 2 * alone.machine.hourly
    assert next(plan for plan in both.plans if plan.stage == "base").tokens == next(plan for plan in alone.plans if plan.stage == "base").tokens
