"What the calculator computes and refuses, and what the sandbox holds back at each level of isolation"
import json, os, re, shutil, socket, sys, tempfile, time
from pathlib import Path

import psutil
import pytest

from nanochat import tools
from nanochat.common import NanochatError
from nanochat.tools import ISOLATION, Result, calculator, isolation_level, run_sandboxed

LEVELS = [level for level in ISOLATION if level == "process" or (level != "bubblewrap" or shutil.which("bwrap")) and sys.platform == "linux" and run_sandboxed("", isolation=level).ok]
WALLED = [level for level in LEVELS if level != "process"]
GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"


@pytest.mark.parametrize("expression, value", [
    ("48/2", "24"), ("0.1+0.2", "0.3"), ("1,000*2", "2000"), ("(1+2)*-3", "-9"), ("7/2", "3.5"), (".5+5.", "5.5"), ("2-3-4", "-5"), ("8/2/2", "2"),
    ("'banana'.count('an')", "2"), ("'a'.count('b')", "0"), ("100000000*1000000", "100000000000000"), ("1/8", "0.125"), ("0*5", "0"), ("-1/4", "-0.25"),
    ("-1/300000000000000/300000000000000", "0"), ("0-0", "0"), ("-0.0", "0"),
    ("12345678901/2", "6172839450"), ("1000000000001/10", "100000000000"), ("24690000001/2", "12345000000"), ("20.5", "20.5")])
def test_calculator_computes(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize("expression", [
    "", " ", "2**3", "1/0", "5/(3-3)", "__import__('os')", "x", "1;2", "(1", "1)", "()", "1 2", "'a'", "'a'.upper()", "'a'+'b'", "'a'.count(1)", "10**100",
    "9" * 300, "(" * 100 + "1" + ")" * 100, "9999999999*9999999999", "\\x41", "'\\n'.count('n')", "1e5", "1_000", "True", "\n1", "²", "٣+١", "." , "1..2"])
def test_calculator_refuses(expression):
    assert calculator(expression) is None


def test_calculator_agrees_with_python_on_random_sums():
    import random
    draw = random.Random(1)
    for _ in range(2000):
        text = "".join(f"{draw.randint(1, 50)}{draw.choice('+-*')}" for _ in range(draw.randint(1, 6))) + str(draw.randint(1, 9))
        value = eval(text)  # a text made here, of digits and three operators
        assert calculator(text) == str(value)


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not on this machine")
def test_calculator_agrees_with_the_annotations_of_gsm8k():
    found = [pair for line in open(GSM8K) for pair in re.findall(r"<<([^<>=]*)=([^<>]*)>>", json.loads(line)["answer"])]
    values = [(calculator(expression), result.replace(",", "")) for expression, result in found]
    answered = sum(value is not None for value, _ in values) / len(values)

    def close(value, result):  # equal, or equal once rounded to the digits that the annotator kept
        try: number, wanted = float(value), float(result)
        except (TypeError, ValueError): return False
        digits = len(result.partition(".")[2])
        return abs(number - wanted) <= 0.51 * 10.0**-digits

    exact = sum(value == result.lstrip("0") or value == result for value, result in values) / len(values)
    rounded = sum(close(*pair) for pair in values) / len(values)
    print(f"{len(values)} annotations: answered {answered:.4f}, equal as text {exact:.4f}, equal after rounding {rounded:.4f}")
    assert answered > .999 and exact > .95 and rounded > .99


def test_sandbox_reports_success_failure_and_output():
    done = run_sandboxed("import sys\nprint('out'); print('err', file=sys.stderr)")
    assert (done.ok, done.stdout, done.stderr, done.error) == (True, "out\n", "err\n", None)
    assert run_sandboxed("assert False, 'no'").error == "AssertionError: no"
    assert not run_sandboxed("import sys; sys.exit(0)").ok, "a program that leaves before its last line has not passed"
    assert not run_sandboxed("import os; os._exit(0)").ok
    assert run_sandboxed("print(input())", stdin="zwölf").stdout == "zwölf\n"
    assert run_sandboxed("print('naïve ☃')").stdout == "naïve ☃\n"
    with pytest.raises(NanochatError): run_sandboxed("", isolation="magic")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(1000)", "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(1)"])
def test_sandbox_ends_a_program_that_does_not(level, code):
    start = time.time()
    result = run_sandboxed(code, timeout=1, isolation=level)
    assert result.timed_out and not result.ok and time.time() - start < 5


@pytest.mark.parametrize("level", LEVELS)
def test_sandbox_bounds_output_memory_and_files(level):
    flood = run_sandboxed("while True: print('x' * 10000)", isolation=level)
    assert not flood.ok and "bytes" in flood.error and len(flood.stdout) <= 65536
    big = run_sandboxed("x = bytearray(2**30)", isolation=level)
    assert big.memory_exceeded and not big.ok
    assert not run_sandboxed("f = open('big', 'wb')\nfor _ in range(100): f.write(bytes(2**20))\nf.close()", isolation=level).ok


@pytest.mark.parametrize("level", LEVELS)
def test_sandbox_scrubs_the_environment(level, monkeypatch):
    monkeypatch.setenv("API_TOKEN", "hunter2")
    result = run_sandboxed("import os, sys; print(sorted(os.environ), 'API_TOKEN' in os.environ, 'site' in sys.modules)", isolation=level)
    assert result.stdout == "['HOME', 'LANG', 'PATH'] False False\n"


@pytest.mark.parametrize("level", WALLED)
def test_sandbox_shows_no_other_files_network_or_processes(level):
    outside = Path(tempfile.mkdtemp()); outside.chmod(0o777)
    assert not run_sandboxed(f"open({str(outside / 'x')!r}, 'w').write('x')", isolation=level).ok
    assert not list(outside.iterdir())
    assert not run_sandboxed("open('/etc/passwd')", isolation=level).ok
    assert not run_sandboxed("open('/usr/planted', 'w')", isolation=level).ok
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not run_sandboxed(f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=1)", isolation=level).ok
    assert not run_sandboxed(f"import os; os.kill({os.getpid()}, 0)", isolation=level).ok
    undo = "import ctypes, os\nl = ctypes.CDLL(None, use_errno=True)\nassert l.mount(b'none', b'/usr', b'tmpfs', 0, None) == -1\nassert l.setuid(0) == -1 or os.getuid() != 0"
    assert run_sandboxed(undo, isolation=level).ok


@pytest.mark.parametrize("level", WALLED)
def test_sandbox_holds_and_reports_what_tries_to_get_out(level, monkeypatch):
    monkeypatch.setenv("API_TOKEN", secret := f"secret{os.getpid()}")
    outside = Path(tempfile.mkdtemp()); outside.chmod(0o777)
    (outside / "note").write_text(secret); (outside / "note").chmod(0o666)
    tries = dict(
        link_to_a_file=f"import os; os.symlink({str(outside / 'note')!r}, 'way'); print(open('way').read())",
        link_to_a_folder=f"import os; os.symlink({str(outside)!r}, 'way'); open('way/planted', 'w').write('x')",
        dots="print(open('../' * 12 + 'etc/passwd').read())",
        environment_of_the_caller=f"print(open('/proc/{os.getpid()}/environ').read())",
        memory_of_the_caller=f"open('/proc/{os.getpid()}/mem', 'rb').read(1)",
        root_of_the_caller=f"import os; print(os.listdir('/proc/{os.getpid()}/root'))",
        trace_of_the_caller=f"import ctypes; assert ctypes.CDLL(None).ptrace(16, {os.getpid()}, 0, 0) == 0",
        end_of_the_caller=f"import os, signal; os.kill({os.getpid()}, signal.SIGKILL)")
    for name, code in tries.items():
        result = run_sandboxed(code, isolation=level, timeout=5)
        assert not result.ok and result.error and secret not in result.stdout + result.stderr, f"{name}: {result}"
    every = "import os\nfor p in os.listdir('/proc'):\n    try: print(open(f'/proc/{p}/environ').read())\n    except OSError: pass"
    assert secret not in run_sandboxed(every, isolation=level).stdout
    for target in ("-1", "os.getppid()"): run_sandboxed(f"import os, signal\ntry: os.kill({target}, signal.SIGKILL)\nexcept OSError: pass", isolation=level)  # this process is still here
    assert [p.name for p in outside.iterdir()] == ["note"] and (outside / "note").read_text() == secret
    assert run_sandboxed("print('still at work')", isolation=level).ok


@pytest.mark.slow
@pytest.mark.skipif(not WALLED, reason="counts in /proc")
def test_two_hundred_runs_leave_no_process_file_or_folder(monkeypatch):
    folders, make = [], tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *args, **named: folders.append(make(*args, **named)) or folders[-1])
    def held(): return len(os.listdir("/proc/self/fd")), len(psutil.Process().children(recursive=True))
    run_sandboxed("print(1)")
    before = held()
    for i in range(200): assert run_sandboxed(f"print({i})" if i % 4 else "raise ValueError").ok == bool(i % 4)
    assert held() == before and len(folders) > 200 and not any(map(os.path.exists, folders))


@pytest.mark.skipif(isolation_level() == "process", reason="without a user of its own, root's processes are not counted")
def test_sandbox_bounds_the_number_of_processes():
    result = run_sandboxed("import os, time\nfor i in range(200):\n    if os.fork() == 0: time.sleep(30); os._exit(0)\nprint('made them all')")
    assert "made them all" not in result.stdout


@pytest.mark.parametrize("level", LEVELS)
def test_sandbox_leaves_nothing_behind(level, monkeypatch):
    mark = f"mark{os.getpid()}{level}"
    code = f"import os, sys, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', '{mark}'])\n    time.sleep(60)\ntime.sleep(.3)"
    folders, make = [], tempfile.mkdtemp  # its own: another test may run a sandbox at the same time
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *args, **named: folders.append(make(*args, **named)) or folders[-1])
    assert run_sandboxed(code, isolation=level).ok

    def left():
        for command in Path("/proc").glob("[0-9]*/cmdline"):
            try: words = command.read_bytes()
            except OSError: continue
            if mark.encode() in words.split(b"\0"): yield command
    assert not list(left())
    assert folders and not any(map(os.path.exists, folders))


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
@pytest.mark.parametrize("level", LEVELS)
def test_sandbox_leaves_no_capability_whatever_the_user(level):
    look = """import ctypes
kernel = ctypes.CDLL(None)
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert kernel.capget(header, sets) == 0
print(sum(sets), kernel.prctl(39, 0, 0, 0, 0))"""  # 39: PR_GET_NO_NEW_PRIVS
    assert run_sandboxed(look, isolation=level).stdout == "0 1\n"


FOLDER = "import os\nfor p in '.', 'main.py': print(oct(os.stat(p).st_mode & 0o077), os.stat(p).st_uid == os.getuid())\nopen('mine', 'w').close()"


def test_no_other_user_may_change_the_program_before_it_runs():
    done = run_sandboxed(FOLDER, isolation="process")
    assert done.ok and done.stdout.startswith("0o0 True\n") and done.stdout.endswith("True\n"), done


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0 or not os.path.exists("/usr/bin/python3"), reason="needs root and a Python that 'nobody' can read")
def test_root_becomes_nobody_where_nobody_can_run_python(monkeypatch):
    monkeypatch.setattr(sys, "_base_executable", "/usr/bin/python3", raising=False)
    monkeypatch.setattr(tools, "_nobody_runs_python", lambda: True)
    umask = os.umask(0o077)
    try: done = run_sandboxed(FOLDER + "\nprint(os.getuid())", isolation="process")
    finally: os.umask(umask)
    assert done.ok and done.stdout.startswith("0o0 True\n") and done.stdout.endswith("True\n65534\n"), done


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is only one level")
def test_a_slow_probe_does_not_lower_the_isolation_for_good(monkeypatch):
    answers = []

    def probe(code, isolation):
        ok, timed_out = answers.pop(0)
        return Result(ok, "", "", None if ok else "no", timed_out, False, isolation)
    slow, works, fails = (False, True), (True, False), (False, False)
    monkeypatch.setattr(tools, "run_sandboxed", probe)
    monkeypatch.setattr(shutil, "which", lambda name: None)  # one level to try: namespaces

    def level(*probes):
        answers[:] = probes
        found = isolation_level()
        assert not answers, "a probe that was not made"
        return found
    monkeypatch.setattr(tools, "_settled", {})
    assert [level(slow, works), level()] == ["namespaces", "namespaces"]
    monkeypatch.setattr(tools, "_settled", {})
    assert [level(slow, slow), level(works), level()] == ["process", "namespaces", "namespaces"]
    monkeypatch.setattr(tools, "_settled", {})
    assert [level(fails, fails), level()] == ["process", "process"]
