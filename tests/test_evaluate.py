"""Evaluation: the same verdicts from any number of processes, for any batch size, and after a restart."""
import os, random, subprocess, sys
from pathlib import Path

import pyarrow as pa, pyarrow.parquet as pq
import pytest, torch

from nanochat import evaluate
from nanochat.checkpoint import save_checkpoint
from nanochat.common import Compute, NanochatError, Run
from nanochat.gpt import GPT, GPTConfig
from nanochat.report import exam_blocks, read_records
from nanochat.tasks import load_task
from nanochat.tokenizer import Tokenizer

ARC = 'allenai/ai2_arc/ARC-Easy/test-00000-of-00001.parquet'
GSM = 'openai/gsm8k/main/test-00000-of-00001.parquet'


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A run with a model of random weights and a root with 21 questions and 5 sums."
    root = tmp_path_factory.mktemp('eval')
    os.environ['NANOCHAT_HOME'] = str(root)
    rows = {ARC: [dict(id=str(i), question='Which? ' * (1 + i % 7) + 'red blue green mill old'.split()[i % 5], choices=dict(text=['red', 'green', 'blue', 'old mill'][:3 + i % 2], label=list('ABCD')[:3 + i % 2]), answerKey='ABC'[i % 3]) for i in range(21)],
            GSM: [dict(question=f'{i}+{i}?', answer=f'<<{i}+{i}={2 * i}>>\n#### {2 * i}') for i in range(5)]}
    for name, table in rows.items():
        (root/'data'/name).parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(table), root/'data'/name)
    pq.write_table(pa.Table.from_pylist(rows[ARC][:7]), root/'data'/ARC.replace('test', 'train'))   # a third of the exam has been trained on
    run = Run.create('graded')
    run.update_info(data_root=str(root/'data'))
    tokenizer = Tokenizer.train(['Which red green blue old mill? '] * 20, 280)
    tokenizer.save(run.path('tokenizer'))
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=64, vocab_size=280, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    with torch.no_grad(): [p.normal_(0, 2. if 'c_proj' in n else .3) for n, p in model.named_parameters() if 'c_proj' in n or 'lm_head' in n]
    save_checkpoint(run.path('sft'), 3, model, tokenizer=tokenizer)
    run.write_json(dict(stage='sft', status='complete', seconds=1, finished='', options=dict(mixture={'ARC-Easy': None}, quiz='letter'), results=dict(steps=3)), 'stages', 'sft.json')
    (root/'toy.yaml').write_text('profile: toy\nstages: {all: {device: cpu, dtype: float32}}\n')
    yield root, run, model.eval(), tokenizer
    del os.environ['NANOCHAT_HOME']


@pytest.fixture
def one(): return Compute(torch.device('cpu'), torch.float32)


def test_a_choice_does_not_depend_on_the_batch_it_is_made_in(home, one):
    root, _, model, tokenizer = home
    task = load_task('ARC-Easy', 'test', root/'data')
    prompts = [evaluate.prompt_ids(tokenizer, c, 640) for c in task]
    scores = torch.cat([evaluate.last_logits(model, [prompt], tokenizer.bos) for prompt in prompts])
    assert len({len(prompt) for prompt in prompts}) > 5 and scores.std(0).min() > 1e-3
    torch.testing.assert_close(evaluate.last_logits(model, prompts, tokenizer.bos), scores, atol=2e-4, rtol=0)
    alone = evaluate.choose_letters(model, tokenizer, list(task), batch_size=1)
    for size in (2, 8, 64): assert evaluate.choose_letters(model, tokenizer, list(task), batch_size=size) == alone
    for conversation, letter in zip(task, alone): assert letter in conversation['letters']


def test_a_question_longer_than_the_model_can_read_is_cut_and_not_fatal(home, one):
    root, _, model, tokenizer = home
    task = load_task('ARC-Easy', 'test', root/'data', stop=3)
    long = [{**c, 'messages': [dict(role='user', content='Which? ' * 2000 + c['messages'][0]['content']), c['messages'][1]]} for c in task]
    assert len(tokenizer.render_for_completion(long[0]['messages'])) > 640
    assert len(evaluate.choose_letters(model, tokenizer, long)) == 3
    assert len(evaluate.write_replies(model, tokenizer, long, max_tokens=4)) == 3


def launch(root, run, processes, *options):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}', '-m', '--', 'nanochat.evaluate'] if processes > 1 else [sys.executable, '-m', 'nanochat.evaluate']
    environment = {**os.environ, 'NANOCHAT_HOME': str(root), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([*command, '--run', run.name, '--profile', str(root/'toy.yaml'), '--stage', 'sft', '--max-tokens', '6', *options], capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    return done


def test_two_processes_give_the_same_file_as_one(home):
    root, run, *_ = home
    results = {}
    for processes in (1, 2):
        run.path('stages', 'eval_sft.json').unlink(missing_ok=True)
        for path in run.path('evals').glob('*'): path.unlink()
        done = launch(root, run, processes, '--num-samples', '3')
        assert done.returncode == 0, done.stderr
        results[processes] = {name: run.read_json('evals', f'sft_{name}.json') for name in ('ARC-Easy', 'GSM8K', 'GSM8K_tries', 'overlap', 'samples')}
        for result in results[processes].values(): result.pop('seconds', None)
    assert results[1] == results[2]
    assert results[1]['ARC-Easy']['n'] == 21 and results[1]['GSM8K']['n'] == 5
    assert evaluate.main(run.name, str(root/'toy.yaml'), stage='sft')['results']['tasks']['GSM8K']['n'] == 5
    tries = results[1]['GSM8K_tries']
    assert [len(example['tries']) for example in tries['examples']] == [3] * 5 and [each['k'] for each in tries['pass_at']] == [1, 2, 3]
    assert len({each['completion'] for example in tries['examples'] for each in example['tries']}) > 10   # each try has chances of its own
    whole = {int(i) for i, share in results[1]['overlap']['problems']['ARC-Easy'].items() if share == 1}
    assert whole == {i for i, row in enumerate(load_task('ARC-Easy', 'test', root/'data').order) if row < 7} and results[1]['overlap']['problems']['GSM8K'] == {}
    searched, overlaps, tried, passes = exam_blocks(read_records(run))   # and the report shows both
    assert overlaps[2][0] == ['ARC-Easy', f"33.3% ({len(results[1]['overlap']['problems']['ARC-Easy']) / 21:.1%})"] and passes[2][0][:3] == ['GSM8K', 'SFT', '0.8']


def test_a_finished_task_is_not_asked_again_unless_the_weights_changed(home, one):
    root, run, *_ = home
    calls = []
    def ask(**identity): return evaluate.reuse_or(run, 'sft_Made', dict(stage='sft', **identity), lambda: calls.append(1) or dict(accuracy=1.), one)
    ask(step=3, weights='aa'), ask(step=3, weights='aa')
    assert len(calls) == 1
    ask(step=3, weights='bb'), ask(step=4, weights='bb')
    assert len(calls) == 3


def test_every_shared_run_is_found_wherever_it_begins():
    rng = random.Random(0)
    def text(n): return [f'w{rng.randrange(500)}' for _ in range(n)]   # so many words that runs agree only where they were copied
    for size in (1, 2, 5, 8, 13):
        questions, documents = ([text(rng.randint(0, 30)) for _ in range(40)] for _ in range(2))
        for question in questions[:20]:   # pieces of the questions, at any place
            at, start = rng.randint(0, 30), rng.randint(0, 12)
            documents.append(text(at) + question[start:start + size + rng.randint(-1, 4)] + text(9))
        def runs(words): return {tuple(words[i:i + size]) for i in range(len(words) - size + 1)} or {tuple(words)}
        found = set().union(*map(runs, documents))
        shares = evaluate.found_shares([' '.join(words) for words in questions], [' '.join(words) for words in documents], size)
        assert shares == [len(runs(words) & found) / len(runs(words)) for words in questions]


def test_a_search_is_made_again_only_for_another_training_or_another_exam(home, one, monkeypatch, capsys):
    root, run, *_ = home
    calls, tasks = [], [load_task('GSM8K', 'test', root/'data')]
    monkeypatch.setattr(evaluate, 'overlap', lambda run, stage, *_: calls.append(stage) or {'GSM8K': {'0': 1., '1': .5}})
    def search(asked='x'): return evaluate.check_overlap(run, one, tasks, 'sft', 9, dict(asked=asked))
    assert search() == search() == {'GSM8K': {'sft': dict(part=.4, whole=.2)}} and calls == ['sft']
    search(asked='y')
    record = run.record('sft')
    run.write_json({**record, 'options': dict(mixture={'GSM8K': None})}, 'stages', 'sft.json')
    search(asked='y')
    assert calls == ['sft'] * 3
    def fail(*_): raise NanochatError('no train file')
    monkeypatch.setattr(evaluate, 'overlap', fail)
    run.write_json({**record, 'results': dict(steps=4)}, 'stages', 'sft.json')
    assert search() == {'GSM8K': {}} and 'cannot be checked: no train file' in capsys.readouterr().out   # the grades stand without it
    run.write_json(record, 'stages', 'sft.json')


@pytest.mark.parametrize('options,message', [(['--tasks', 'Trivia'], 'no task is called'), (['--num-samples', '4', '--temperature', '0'], '4 tries would all be the same'), (['--tasks', 'SmolTalk'], 'no test file'), (['--stage', 'rl'], 'needs stage rl'), (['--max-problems', 'many'], 'max_problems')])
def test_bad_options_get_one_line_and_status_2(home, options, message, capsys):
    root, run, *_ = home
    run.path('stages', 'eval_sft.json').unlink(missing_ok=True)
    with pytest.raises(SystemExit) as end: evaluate.main.cli(['--run', run.name, '--profile', str(root/'toy.yaml'), *options])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count('\n') == 1
