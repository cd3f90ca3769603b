"""Evaluation: the same verdicts from any number of processes, for any batch size, and after a restart."""
import os, subprocess, sys
from pathlib import Path

import pyarrow as pa, pyarrow.parquet as pq
import pytest, torch

from nanochat import evaluate
from nanochat.checkpoint import save_checkpoint
from nanochat.common import Compute, Run
from nanochat.gpt import GPT, GPTConfig
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
    run = Run.create('graded')
    run.update_info(data_root=str(root/'data'))
    tokenizer = Tokenizer.train(['Which red green blue old mill? '] * 20, 280)
    tokenizer.save(run.path('tokenizer'))
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=64, vocab_size=280, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    with torch.no_grad(): [p.normal_(0, 2. if 'c_proj' in n else .3) for n, p in model.named_parameters() if 'c_proj' in n or 'lm_head' in n]
    save_checkpoint(run.path('sft'), 3, model, tokenizer=tokenizer)
    run.write_json(dict(stage='sft', status='complete', seconds=1, finished=''), 'stages', 'sft.json')
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
        done = launch(root, run, processes)
        assert done.returncode == 0, done.stderr
        results[processes] = {name: run.read_json('evals', f'sft_{name}.json') for name in ('ARC-Easy', 'GSM8K', 'samples')}
        for result in results[processes].values(): result.pop('seconds', None)
    assert results[1] == results[2]
    assert results[1]['ARC-Easy']['n'] == 21 and results[1]['GSM8K']['n'] == 5
    assert evaluate.main(run.name, str(root/'toy.yaml'), stage='sft')['results']['tasks']['GSM8K']['n'] == 5


def test_a_finished_task_is_not_asked_again_unless_the_weights_changed(home, one):
    root, run, *_ = home
    calls = []
    def ask(**identity): return evaluate.reuse_or(run, 'sft_Made', dict(stage='sft', **identity), lambda: calls.append(1) or dict(accuracy=1.), one)
    ask(step=3, weights='aa'), ask(step=3, weights='aa')
    assert len(calls) == 1
    ask(step=3, weights='bb'), ask(step=4, weights='bb')
    assert len(calls) == 3


@pytest.mark.parametrize('options,message', [(['--tasks', 'Trivia'], 'no task is called'), (['--tasks', 'SmolTalk'], 'no test file'), (['--stage', 'rl'], 'needs stage rl'), (['--max-problems', 'many'], 'max_problems')])
def test_bad_options_get_one_line_and_status_2(home, options, message, capsys):
    root, run, *_ = home
    run.path('stages', 'eval_sft.json').unlink(missing_ok=True)
    with pytest.raises(SystemExit) as end: evaluate.main.cli(['--run', run.name, '--profile', str(root/'toy.yaml'), *options])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count('\n') == 1
