"""The measures of a base model: bits per byte and CORE, against published figures, by hand, and over processes."""
import csv
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from nanochat.common import Compute, NanochatError
from nanochat.core import (Row, bits_per_byte, centered, centered_error, draw_shots, evaluate_core, evaluate_task, load_bundle, load_items, render_prompts,
                           score_items, score_rows, tokenize_prompts, unigram_bits_per_byte, wilson)
from nanochat.dataloader import rows_to_batch
from nanochat.gpt import GPT, GPTConfig

REAL = Path(__file__).resolve().parents[2]/'shared'/'data'/'core_bundle'/'eval_bundle'
real = pytest.mark.skipif(not REAL.exists(), reason='no evaluation bundle here')
COMPUTE = Compute(torch.device('cpu'), torch.float32)


class ByteTokenizer:
    "A token a byte."
    bos, vocab_size = 256, 257
    def encode(self, texts, prepend=None): return [[prepend] + list(text.encode()) for text in texts]

def make_model(vocab_size=257, sequence_len=64, seed=0, n_layer=2, recipe='classic'):
    torch.manual_seed(seed)
    model = GPT(GPTConfig.from_depth(n_layer, vocab_size, sequence_len, recipe=recipe, n_head=2, n_kv_head=1, n_embd=64))
    for weight in model.parameters(): torch.nn.init.normal_(weight, std=.15)
    return model

@pytest.fixture
def bundle(tmp_path):
    "Three tasks of ten items each about sums."
    items = dict(
        pick=('multiple_choice', 3, 25, [dict(query=f'{i} plus 1 is', choices=[str(i + k)*(k + 1) for k in range(4)], gold=1) for i in range(10)]),
        match=('schema', 0, 50, [dict(context_options=[f'The sum of {i} and 1', f'The sum of {i} and 2'], continuation=f'is {i + 1}', gold=0) for i in range(10)]),
        go_on=('language_modeling', 4, 0, [dict(context=f'{i} {i + 1} ', continuation=f'{i + 2}') for i in range(10)]))
    (tmp_path/'eval_data').mkdir()
    for name, (*_, rows) in items.items(): (tmp_path/f'eval_data/{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (tmp_path/'core.yaml').write_text(yaml.safe_dump(dict(icl_tasks=[dict(label=n, icl_task_type=k, dataset_uri=f'{n}.jsonl', num_fewshot=[s]) for n, (k, s, _, _) in items.items()])))
    (tmp_path/'eval_meta_data.csv').write_text('Eval Task,Random baseline\n' + ''.join(f'{n},{b}\n' for n, (_, _, b, _) in items.items()))
    return tmp_path


# bits per byte

def make_batches(n=6): return [rows_to_batch([(torch.randint(0, 257, (33,), generator=torch.Generator().manual_seed(4*i + r)).tolist(), [1]*33) for r in range(4)]) for i in range(n)]

def test_bits_per_byte_by_hand():
    model, batches, sizes = make_model(), make_batches(), torch.tensor([1]*256 + [0])
    nats = [F.cross_entropy(model(b.inputs).flatten(0, 1), b.targets.flatten(), reduction='none') for b in batches]
    counted = [sizes[b.targets.flatten()] for b in batches]
    expected = sum((n*(s > 0)).sum().item() for n, s in zip(nats, counted))/math.log(2)/sum(s.sum().item() for s in counted)
    assert math.isclose(bits_per_byte(model, batches, sizes, COMPUTE), expected, rel_tol=1e-5)

def test_special_and_ignored_targets_count_neither_in_nats_nor_in_bytes():
    batches, sizes = make_batches(1), torch.tensor([2]*256 + [0])
    class Model:
        def __call__(self, inputs, targets, reduction): return torch.where((targets < 0) | (targets == 256), 1e6, 1.0)
    hidden = [b._replace(targets=torch.where(torch.rand(b.targets.shape) < .5, -1, b.targets)) for b in batches]
    assert math.isclose(bits_per_byte(Model(), hidden, sizes, COMPUTE), 1/math.log(2)/2, rel_tol=1e-5)

def test_no_text_is_an_error_not_nan():
    with pytest.raises(NanochatError, match='no text'): bits_per_byte(make_model(), [], [1]*257, COMPUTE)

def test_unigram_of_seen_text_is_near_its_entropy():
    row = ([0, *([1, 1, 1, 2]*50)], [1]*201)
    entropy = -(.75*math.log2(.75) + .25*math.log2(.25))
    assert abs(unigram_bits_per_byte([rows_to_batch([row]*50)], [rows_to_batch([row])], [1]*4, COMPUTE) - entropy) < .01


# CORE by hand

def test_shots_are_those_of_a_sample_from_the_list_of_others():
    items = list(range(50))
    for i in (0, 7, 49): assert draw_shots(items, i, 10) == random.Random(1234 + i).sample([j for j in items if j != i], 10)

def test_a_few_items_are_the_first_of_all_with_the_same_shots(bundle):
    task, model = load_bundle(bundle)[0], make_model()
    few = [evaluate_task(model, ByteTokenizer(), task, COMPUTE, max_per_task=n) for n in (1, 2, 10)]
    assert [result['n'] for result in few] == [1, 2, 10]

def test_multiple_choice_takes_the_lowest_mean_loss(bundle):
    task, model, tokenizer = load_bundle(bundle)[0], make_model(), ByteTokenizer()
    items, right = load_items(task), 0
    for i, item in enumerate(items):
        prompts = render_prompts(task, item, draw_shots(items, i, 3))
        ids = tokenizer.encode(prompts, prepend=256)
        start = next(t for t, column in enumerate(zip(*ids)) if len(set(column)) > 1)
        losses = [F.cross_entropy(model(torch.tensor([row]))[0, start - 1:-1], torch.tensor(row[start:])).item() for row in ids]
        right += losses.index(min(losses)) == item['gold']
    assert evaluate_task(model, tokenizer, task, COMPUTE)['accuracy'] == pytest.approx(right/10)

def test_language_modeling_wants_every_token(bundle):
    task, tokenizer = load_bundle(bundle)[2], ByteTokenizer()
    row, = tokenize_prompts(task.kind, ['ab', 'ab cd'], tokenizer)
    assert bytes(row.ids[row.start:row.stop]) == b' cd'
    class Oracle:
        "Knows the next token, but for the positions in `wrong`."
        config, wrong = GPTConfig(vocab_size=257), ()
        def hidden(self, ids, cache=None): return torch.stack([torch.where(torch.isin(torch.arange(ids.size(1)), torch.tensor(self.wrong)), 0, ids.roll(-1, 1)[0])])[..., None].float()
        def logits(self, x): return F.one_hot(x[..., 0].long(), 257).float()*50
    model = Oracle()
    assert score_rows(model, [row], 256, 'cpu')[0][1]
    for t in range(row.start - 1, row.stop - 1):
        model.wrong = (t,)
        assert not score_rows(model, [row], 256, 'cpu')[0][1]

def test_prompt_without_answer_does_not_end_in_a_space(bundle):
    task = load_bundle(bundle)[2]
    items = load_items(task)
    without, full = render_prompts(task, items[0], draw_shots(items, 0, 4))
    assert not without.endswith(' ') and full.startswith(without) and without.count('\n\n') == 4

def test_an_answer_that_begins_another_answer_is_still_scored():
    rows = tokenize_prompts('multiple_choice', ['x a', 'x a b'], ByteTokenizer())
    assert all(row.start < row.stop for row in rows)

@pytest.mark.parametrize('tokens', [1, 200, 10_000])
@pytest.mark.parametrize('recipe', ['classic', 'modern'])
def test_reading_a_shared_start_once_changes_no_score(tokens, recipe):
    model, rng = make_model(recipe=recipe), random.Random(0)
    items = []
    for length in (20, 35, 50, 31):
        start = [rng.randrange(257) for _ in range(length)]
        items.append([Row(start + [rng.randrange(257) for _ in range(tail)], length, length + tail) for tail in (3, 1, 6)])
    plain, shared = (score_items(model, items, 256, 'cpu', tokens=tokens, share=share) for share in (False, True))
    assert all(math.isclose(a, b, abs_tol=1e-4) and x == y for p, s in zip(plain, shared) for (a, x), (b, y) in zip(p, s))

def test_long_prompts_lose_their_start_and_keep_the_answer(bundle):
    task, model = load_bundle(bundle)[0], make_model(sequence_len=4)  # room for 40 positions
    assert evaluate_task(model, ByteTokenizer(), task, COMPUTE)['n'] == 10

def test_core_is_the_mean_of_centred_scores_and_leaves_the_model_in_training_mode(bundle):
    model = make_model().train()
    results = evaluate_core(model, ByteTokenizer(), bundle, COMPUTE)
    assert results['core'] == pytest.approx(sum(task['centered'] for task in results['tasks'].values())/3) and model.training
    json.dumps(results)

def test_the_interval_is_the_one_that_wilson_published_and_stays_between_0_and_1():
    assert wilson(.5, 10) == pytest.approx((.2366, .7634), abs=1e-4) and wilson(0., 10) == pytest.approx((0, .2775), abs=1e-4)  # Newcombe 1998, method 3
    for n, right in ((1, 0), (1, 1), (32, 32), (500, 1)):
        p, (low, high) = right/n, wilson(right/n, n)
        assert 0 <= low <= p <= high <= 1
        for end in (low, high): assert end in (0, 1) or abs(p - end) == pytest.approx(1.96*math.sqrt(end*(1 - end)/n))  # what defines it

def test_every_task_of_core_says_how_sure_it_is_and_so_does_their_mean(bundle, monkeypatch):
    dice = random.Random(1)
    monkeypatch.setattr('nanochat.core.is_right', lambda *_: dice.random() < .6)
    results = evaluate_core(make_model(), ByteTokenizer(), bundle, COMPUTE)
    for task in results['tasks'].values():
        assert task['interval'] == pytest.approx(wilson(task['accuracy'], 10), abs=1e-4)
        assert task['centered_error'] == pytest.approx(math.sqrt(task['accuracy']*(1 - task['accuracy'])/10)/(1 - task['baseline']/100))
    exams = 4000  # of the same questions again and again
    def again(task): return centered(sum(dice.random() < task['accuracy'] for _ in range(10))/10, task['baseline'])
    means = [sum(map(again, results['tasks'].values()))/3 for _ in range(exams)]
    mean = sum(means)/exams
    assert results['error'] == pytest.approx(math.sqrt(sum((each - mean)**2 for each in means)/exams), rel=.05) and centered_error(1., 10, 25) == 0

def test_ranks_together_ask_each_item_once(bundle):
    task, model = load_bundle(bundle)[0], make_model()
    whole = evaluate_task(model, ByteTokenizer(), task, COMPUTE)
    parts = []
    for rank in range(3):
        compute = replace(COMPUTE, rank=rank, world_size=3)
        compute.all_reduce = lambda x: x
        parts.append(evaluate_task(model, ByteTokenizer(), task, compute))
    assert sum(part['n'] for part in parts) == 10 and sum(part['accuracy']*part['n'] for part in parts) == pytest.approx(10*whole['accuracy'])

def test_two_processes_measure_what_one_does(bundle, tmp_path):
    script = tmp_path/'measure.py'
    script.write_text(f'''
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import json
from nanochat.common import compute_cleanup, compute_init, leave_now
from test_core import *
compute = compute_init(device='cpu', dtype='float32')
model, batches = make_model(), make_batches(6)
bpb = bits_per_byte(model, batches[compute.rank::compute.world_size], [1]*256 + [0], compute)
core = evaluate_core(model, ByteTokenizer(), {str(bundle)!r}, compute)
if compute.is_main: print(json.dumps([bpb, core['core'], [task['n'] for task in core['tasks'].values()]]))
compute_cleanup(); leave_now()
''')
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'NANOCHAT_HOME': str(tmp_path/'home')}
    outputs = []
    for launch in ([], ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']):
        done = subprocess.run([sys.executable, *launch, str(script)], capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(json.loads(done.stdout.strip().splitlines()[-1]))
    assert outputs[0][0] == pytest.approx(outputs[1][0], rel=1e-6) and outputs[0][1] == pytest.approx(outputs[1][1]) and outputs[1][2] == [10, 10, 10]

@pytest.mark.parametrize('damage, says', [('{"query": "a"}\n', 'line 1: no field'), ('{"query": \n', 'line 1: not JSON'), ('', 'is empty')])
def test_a_damaged_task_file_is_named_with_its_line(bundle, damage, says):
    (bundle/'eval_data/pick.jsonl').write_text(damage)
    with pytest.raises(NanochatError, match=f'pick.*{says}'): load_items(load_bundle(bundle)[0])

def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(NanochatError, match='not an evaluation bundle'): load_bundle(tmp_path)


# the real bundle

@real
def test_real_bundle_has_the_22_tasks_of_core_with_their_own_baselines():
    tasks = {task.label: task for task in load_bundle(REAL)}
    assert len(tasks) == 22 and tasks['boolq'].baseline == 62 and tasks['commonsense_qa'].baseline == 20 and tasks['bigbench_language_identification'].baseline == 9.1
    assert tasks['jeopardy'].delimiter == '\nAnswer: ' and tasks['agi_eval_lsat_ar'].num_fewshot == 3 and len(load_items(tasks['arc_challenge'])) == 1172

@real
def test_published_gpt2_scores_follow_from_their_accuracies():
    baselines = {task.label: task.baseline for task in load_bundle(REAL)}
    rows = {row[0].strip(): row[1:] for row in csv.reader(open(REAL/'openai-community-gpt2.csv')) if row}
    scores = {label: centered(float(rows[label][0]), baseline) for label, baseline in baselines.items()}
    for label, score in scores.items(): assert score == pytest.approx(float(rows[label][1]), abs=2e-6)
    assert sum(scores.values())/22 == pytest.approx(float(rows['CORE'][1]), abs=2e-6) == 0.113891

def gpt2_tokenizer(monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(REAL.parents[1]/'tokenizers'/'tiktoken_cache'))
    import tiktoken
    encoding = tiktoken.get_encoding('gpt2')
    class Tokenizer:
        bos = 50256
        def encode(self, texts, prepend=None): return [[prepend] + encoding.encode_ordinary(text) for text in texts]
        def decode(self, ids): return encoding.decode(ids)
    return Tokenizer()

@real
def test_real_answers_are_whole_in_gpt2_tokens(monkeypatch):
    tokenizer = gpt2_tokenizer(monkeypatch)
    for task in load_bundle(REAL):
        items = load_items(task)
        for i in range(0, min(len(items), 60), 3):
            prompts = render_prompts(task, items[i], draw_shots(items, i, task.num_fewshot))
            rows = tokenize_prompts(task.kind, prompts, tokenizer)
            if task.kind == 'language_modeling':
                assert tokenizer.encode(prompts[:1], prepend=tokenizer.bos)[0] == rows[0].ids[:rows[0].start]  # the reference system, October 2025: an exact prefix
                assert tokenizer.decode(rows[0].ids[rows[0].start:]).strip() == items[i]['continuation'].strip()
            if task.kind == 'schema': assert all(items[i]['continuation'].endswith(tokenizer.decode(row.ids[row.start:row.stop]).strip()) or tokenizer.decode(row.ids[row.start:]).strip().endswith(items[i]['continuation']) for row in rows)
            if task.kind == 'multiple_choice':
                assert all(choice.strip().endswith(tokenizer.decode(row.ids[row.start:row.stop]).strip()[-20:]) for choice, row in zip(items[i]['choices'], rows))

@real
def test_a_random_model_scores_about_nothing_on_the_real_bundle(monkeypatch):
    gpt2 = gpt2_tokenizer(monkeypatch)
    class Folded:
        "GPT-2's tokens folded into 1,000 ids: for a model that knows nothing any 1,000 will do, and its last matrix stays small."
        bos = 1000
        def encode(self, texts, prepend=None): return [[prepend] + [i % 1000 for i in ids[1:]] for ids in gpt2.encode(texts, prepend)]
    model = make_model(vocab_size=1001, sequence_len=512, n_layer=1)
    results = evaluate_core(model, Folded(), REAL, COMPUTE, max_per_task=10)
    assert len(results['tasks']) == 22 and all(task['n'] == 10 for task in results['tasks'].values())
    assert abs(results['core']) < .15
    assert all(task['accuracy'] == 0 for task in results['tasks'].values() if task['kind'] == 'language_modeling')
