"""Our models under lm-evaluation-harness, and models of transformers under our CORE: the arithmetic by hand, and both examiners on the same questions."""
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from nanochat import hf
from nanochat.checkpoint import save_checkpoint
from nanochat.common import Compute, NanochatError, Run
from nanochat.core import evaluate_core, load_bundle, load_items, render_prompts, score_items, tokenize_prompts
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer

harness = pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm_eval (lm-evaluation-harness) is not installed")
with_transformers = pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
TEXT = "The cat sat on the mat, and the dog sat on the cat's tail. 12 + 30 = 42, isn't it? Größe, naïve, 東京 🙂!\n"
COMPUTE = Compute(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def tokenizer(): return Tokenizer.train([TEXT] * 50, 320)

@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(2, tokenizer.vocab_size, 48, n_head=4, n_kv_head=2, n_embd=64)).eval()
    for weight in model.parameters(): torch.nn.init.normal_(weight, std=1.2 / weight.size(-1)**0.5)
    return model.requires_grad_(False)

@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory): return hf.save(model, tokenizer, tmp_path_factory.mktemp("exported") / "out")

def request(*args): return SimpleNamespace(args=args)

def questions(n=40):
    "Sums with four answers of different lengths; the context of every fourth is longer than the model's window"
    return [dict(query=("The dog sat on the mat. " * 12 if i % 4 == 3 else "") + f"{i} + {i % 7} =", choices=[f"{i + i % 7}", f"{i} cats", "the mat, isn't it?", f"{2 * i + 1}"], gold=0) for i in range(n)]

def pairs(items): return [(item["query"], " " + choice) for item in items for choice in item["choices"]]

def log_p(model, ids): return model(torch.tensor([ids]))[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0] # of all but the first

def by_fours(scores): return [max(range(4), key=scores[i:i + 4].__getitem__) for i in range(0, len(scores), 4)]


# the adapter's arithmetic

@pytest.mark.parametrize("context", ["The cat sat on", "The cat sat on  \n", "", "The dog sat on the mat. " * 12])
@pytest.mark.parametrize("continuation", [" the mat", " 42"])
def test_a_continuation_gets_the_sum_of_its_tokens(model, tokenizer, context, continuation):
    (nats, greedy), = hf.Examinee(model, tokenizer).loglikelihood([request(context, continuation)])
    ids, start = tokenizer.encode(context + continuation, prepend=tokenizer.bos), len(tokenizer.encode(context.rstrip())) + 1
    ids, scored = ids[-49:], len(ids) - start # 48 that are read, and the last one
    assert nats == pytest.approx(log_p(model, ids)[-scored:].sum().item(), abs=1e-3)
    assert not greedy

def test_what_greedy_decoding_writes_is_called_greedy(model, tokenizer):
    examinee, context = hf.Examinee(model, tokenizer), "The cat sat on"
    ids, written = tokenizer.encode(context, prepend=tokenizer.bos), []
    for _ in range(3): written.append(model(torch.tensor([ids + written]))[0, -1].argmax().item())
    row = hf.Row(ids + written, len(ids), len(ids) + 3)
    assert examinee.score([[row]])[0][1]
    row.ids[-1] = (row.ids[-1] + 1) % 300
    assert not examinee.score([[row]])[0][1]

def test_answers_come_in_the_order_of_the_requests(model, tokenizer):
    examinee, asked = hf.Examinee(model, tokenizer, tokens=100), [request(*pair) for pair in pairs(questions(8))]
    mixed = asked[::3] + asked[1::3] + asked[2::3]
    alone = {r.args: examinee.loglikelihood([r])[0][0] for r in mixed}
    for many in (asked, mixed): assert [nats for nats, _ in examinee.loglikelihood(many)] == pytest.approx([alone[r.args] for r in many], abs=1e-3)

@pytest.mark.parametrize("length", [0, 1, 5, 47, 48, 49, 96, 97, 130])
def test_windows_score_every_token_once_and_read_no_more_than_fits(length):
    rows = hf.windows(list(range(length + 1)), 48)
    assert [i for row in rows for i in row.ids[row.start:row.stop]] == list(range(1, length + 1))
    assert all(row.start >= 1 and row.stop == len(row.ids) <= 49 and row.ids == list(range(row.ids[0], row.ids[0] + len(row.ids))) for row in rows)
    assert len(rows) < 2 or len(rows[-1].ids) == 49 # the last reaches back

def test_a_long_text_is_the_sum_of_its_windows(model, tokenizer):
    ids = tokenizer.encode(TEXT * 3, prepend=tokenizer.bos)
    expected = sum(log_p(model, row.ids)[row.start - 1:].sum().item() for row in hf.windows(ids, 48))
    long, empty = hf.Examinee(model, tokenizer).loglikelihood_rolling([request(TEXT * 3), request("")])
    assert long == pytest.approx(expected, abs=1e-2) and empty == 0

def test_writing_is_greedy_stops_where_asked_and_ends_before_the_stop_text(model, tokenizer):
    examinee, context = hf.Examinee(model, tokenizer), "The cat"
    sample = Engine(model, tokenizer, max_len=100).generate([tokenizer.encode(context, prepend=tokenizer.bos)], max_tokens=20, temperature=0, tools=False)[0][0]
    whole, = examinee.generate_until([request(context, dict(until=[], max_gen_toks=20))])
    assert whole == tokenizer.decode(sample.ids)
    stop = whole[5:7]
    short, other = examinee.generate_until([request(context, dict(until=["", stop], max_gen_toks=20)), request(TEXT * 5, dict(max_tokens=3))])
    assert short == whole[:whole.index(stop)] and other

@pytest.mark.parametrize("wanted, temperature", [({}, 0), (dict(temperature=.7), .7), (dict(temperature=.7, do_sample=False), 0), (dict(do_sample=False), 0)])
def test_sampling_only_where_the_task_asks_for_it(wanted, temperature): assert hf.generation_settings(wanted)["temperature"] == temperature

def test_without_the_harness_one_line_says_what_to_install(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(NanochatError, match="pip install lm-eval"): hf.for_lm_eval(model, tokenizer)


# models of transformers under our rules

def make_bundle(path, items):
    (path / "eval_data").mkdir(parents=True)
    (path / "eval_data/sums.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (path / "core.yaml").write_text(yaml.safe_dump(dict(icl_tasks=[dict(label="sums", icl_task_type="multiple_choice", dataset_uri="sums.jsonl", num_fewshot=[0])])))
    (path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nsums,25\n")
    return path

@with_transformers
def test_core_of_a_borrowed_model_is_that_of_the_model_it_was_exported_from(model, tokenizer, folder, tmp_path):
    bundle = make_bundle(tmp_path / "bundle", questions())
    theirs, ours = (evaluate_core(*each, bundle, COMPUTE, tokens=500) for each in (hf.borrow(folder), (model, tokenizer)))
    assert theirs["core"] == ours["core"] and 0 < ours["tasks"]["sums"]["accuracy"] < 1
    items = [tokenize_prompts("multiple_choice", [q + c for q, c in pairs([item])], tokenizer) for item in questions()]
    scores = [[nats for item in score_items(m, items, tokenizer.bos, "cpu") for nats, _ in item] for m in (hf.borrow(folder)[0], model)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)

@with_transformers
def test_a_borrowed_tokenizer_begins_texts_and_asks_questions_as_ours(tokenizer, folder):
    theirs = hf.borrow(folder)[1]
    assert theirs.bos == tokenizer.bos and theirs.encode(TEXT) == tokenizer.encode(TEXT) and theirs.encode([TEXT, "a"], prepend=theirs.bos) == tokenizer.encode([TEXT, "a"], prepend=tokenizer.bos)
    talk = [dict(role="user", content="12 + 30?"), dict(role="assistant", content="42")]
    assert theirs.render_for_completion(talk) == tokenizer.render_for_completion(talk) == theirs.render_for_completion(talk[:1])


# both examiners

def open_in_harness(folder, **options):
    from lm_eval.models.huggingface import HFLM
    return HFLM(pretrained=str(folder), batch_size=4, device="cpu", dtype="float32", **options)

@pytest.fixture(scope="module")
def hflm(folder): return open_in_harness(folder, add_bos_token=True)

def instances(kind, requests):
    from lm_eval.api.instance import Instance
    return [Instance(kind, {}, args, i) for i, args in enumerate(requests)]

@harness
def test_windows_are_those_of_the_harness():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    for length in (1, 5, 47, 48, 49, 96, 97, 130):
        theirs = [make_disjoint_window(pair) for pair in get_rolling_token_windows(list(range(1, length + 1)), 0, 48, 1)]
        assert [(row.ids[:row.start], row.ids[row.start:]) for row in hf.windows(list(range(length + 1)), 48)] == theirs

@harness
def test_adapter_and_exported_folder_give_the_harness_the_same_numbers_and_decisions(model, tokenizer, hflm):
    lm, asked = hf.for_lm_eval(model, tokenizer), instances("loglikelihood", pairs(questions()))
    (ours, our_greedy), (theirs, their_greedy) = (zip(*each.loglikelihood(asked, disable_tqdm=True)) for each in (lm, hflm))
    assert ours == pytest.approx(theirs, abs=1e-3) and our_greedy == their_greedy
    assert by_fours(ours) == by_fours(theirs) and len(set(by_fours(ours))) > 1

@harness
def test_adapter_and_exported_folder_score_and_write_the_same_texts(model, tokenizer, hflm, folder):
    lm = hf.for_lm_eval(model, tokenizer)
    texts = instances("loglikelihood_rolling", [(TEXT,), (TEXT * 4,)])
    once, twice = (each.loglikelihood_rolling(texts, disable_tqdm=True) for each in (open_in_harness(folder), hflm)) # for whole texts the harness adds a <|bos|> itself
    assert lm.loglikelihood_rolling(texts) == pytest.approx(once, abs=1e-2) and once != pytest.approx(twice, abs=1)
    asked = instances("generate_until", [(context, dict(until=[" the", "\n"], max_gen_toks=16)) for context in ("The cat", "12 + 30 =", "Where? On")])
    assert lm.generate_until(asked) == hflm.generate_until(asked, disable_tqdm=True)

@harness
def test_core_and_the_harness_decide_every_question_alike(model, tokenizer, hflm, tmp_path):
    task, = load_bundle(make_bundle(tmp_path / "bundle", [item for i, item in enumerate(questions(80)) if i % 4 < 3]))
    items = load_items(task)
    rows = [tokenize_prompts(task.kind, render_prompts(task, item, []), tokenizer) for item in items]
    ours = [-loss * (row.stop - row.start) for item, scores in zip(rows, score_items(model, rows, tokenizer.bos, "cpu")) for row, (loss, _) in zip(item, scores)]
    asked = instances("loglikelihood", pairs(items))
    for lm in (hflm, hf.for_lm_eval(model, tokenizer)): assert by_fours(ours) == by_fours([nats for nats, _ in lm.loglikelihood(asked, disable_tqdm=True)])

@harness
def test_one_command_examines_a_run_with_a_task_from_a_file(model, tokenizer, hflm, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path))
    run, items = Run.create("r", profile="kindergarten"), questions(20)
    tokenizer.save(run.path("tokenizer"))
    save_checkpoint(run.path("base"), 7, model, tokenizer=tokenizer)
    run.write_json(dict(stage="base", status="complete"), "stages", "base.json")
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/sums.yaml").write_text(yaml.safe_dump(dict(
        task="sums", dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(tmp_path / "items.jsonl"))), test_split="test", output_type="multiple_choice",
        doc_to_text="{{query}}", doc_to_choice="{{choices}}", doc_to_target="gold", metric_list=[dict(metric="acc")])))
    hf.examine.cli(["--run", "r", "--all", "{device: cpu, dtype: float32}", "--tasks", "sums", "--limit", "15", "--include", str(tmp_path / "tasks")])
    results = run.record("lm_eval_base")["results"]
    expected = by_fours([nats for nats, _ in hflm.loglikelihood(instances("loglikelihood", pairs(items[:15])), disable_tqdm=True)])
    assert results["step"] == 7 and results["tasks"]["sums"]["acc,none"] == pytest.approx(expected.count(0) / 15)
    assert "sums" in capsys.readouterr().out
    with pytest.raises(NanochatError, match="no task 'sum'"): hf.examine("r", tasks=["sum"], include=str(tmp_path / "tasks"))


# the recorded comparison on a real model

def test_the_record_shows_the_same_decisions_on_98_of_100_real_questions():
    record = json.loads((Path(__file__).resolve().parents[1] / "runs_recorded/lm_eval_agreement.json").read_text())
    assert len(record["tasks"]) == 6
    for name, task in record["tasks"].items():
        for rule in {"sum", "mean"} & set(task): assert task[rule]["same"] >= .98 * task["items"] >= .98 * 20, (name, rule)
