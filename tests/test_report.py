"""The report card: from records alone, in any state of a run, the same bytes each time, safe with whatever a model wrote."""
import itertools, re, shutil, subprocess, sys
from html.parser import HTMLParser

import pytest

from nanochat import report
from nanochat.common import Run

PNG_FREE = re.compile(r'(?:src|href)\s*=|url\(|@import|<script', re.I)
HOSTILE = '</pre><script>alert(1)</script> | a | b |\n````\n# not a heading\n```\n![x](http://example.org/x.png) \u202e <<3+4=7>>'


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv('NANOCHAT_HOME', str(tmp_path))
    run = Run.create('card', profile='toy')
    run.update_info(created='2026-01-01 00:00:00', code=dict(files=1, lines=2, characters=3, tokens=0), git={},
                    machine=dict(cpus=2, memory_gb=8.0, gpus=[], python='3.12', torch='2.9', platform='Linux', machine='x86_64'))
    return run


def fill(run):
    for i, name in enumerate(report.STAGES):
        run.write_json(dict(stage=name, status='complete', options=dict(lr=.02, tasks=['GSM8K'], mixture={'SmolTalk': 3}), results=dict(step=7, nothing=None), seconds=60. * i,
                            processes=1, device='cpu', dtype='float32', finished=f'2026-01-01 00:{i:02d}:00'), 'stages', f'{name}.json')
    for stage in ('base', 'mid', 'sft', 'rl'):
        for step in range(30): run.log(stage, step, loss=3 - step / 20, tok_per_sec=float(step > 5), val_bpb=float('nan') if step == 3 else 2. - step / 30)
    for stage, right in dict(mid=20, sft=60, rl=90).items():
        for task, guess in {'ARC-Easy': .25, 'GSM8K': 0.}.items():
            examples = [dict(prompt=f'{i} {HOSTILE}', answer='7', completion=HOSTILE, correct=i < right) for i in range(100)]
            run.write_json(dict(stage=stage, task=task, step=5, accuracy=right / 100, stderr=.04, n=100, baseline=guess, centered=(right / 100 - guess) / (1 - guess), examples=examples), 'evals', f'{stage}_{task}.json')
        run.write_json(dict(stage=stage, step=5, samples=[dict(prompt=HOSTILE, completion=HOSTILE)]), 'evals', f'{stage}_samples.json')
    run.write_json(dict(stage='base', step=5, samples=[dict(prompt='The', completion=HOSTILE)]), 'evals', 'base_samples.json')
    run.write_json(dict(stage='base', step=5, train_bpb=1., val_bpb=1.1, unigram_bpb=2.), 'evals', 'base_bpb.json')
    run.write_json(dict(stage='base', step=5, core=.3, tasks={f't{i}': dict(accuracy=.6, centered=.3, n=2000, baseline=25.) for i in range(22)}), 'evals', 'base_CORE.json')


class Outline(HTMLParser):
    "Open and closed elements, to see that a page is well formed."
    def __init__(self): super().__init__(); self.open, self.tags = [], []
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ('meta', 'line', 'polyline', 'circle'): self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self.tags.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag, tag


def written(run): return run.path('report.md').read_bytes(), run.path('report.html').read_bytes()


def test_the_same_records_give_the_same_bytes_also_elsewhere(run, tmp_path, monkeypatch):
    fill(run)
    report.write_report(run)
    first = written(run)
    monkeypatch.setenv('NANOCHAT_HOME', str(tmp_path/'elsewhere'))
    shutil.copytree(run.dir, tmp_path/'elsewhere'/'runs'/'card')
    copy = Run.open('card')
    for name in ('report.md', 'report.html'): copy.path(name).unlink()
    report.write_report(copy)
    assert copy.dir != run.dir and written(copy) == first


def test_the_page_loads_nothing_and_is_well_formed_whatever_models_wrote(run):
    fill(run)
    report.write_report(run)
    md, web = (text.decode() for text in written(run))
    assert not PNG_FREE.search(re.sub(r'<pre>.*?</pre>|<td>.*?</td>|<figcaption>.*?</figcaption>', '', web, flags=re.S))
    assert '<script' not in web
    outline = Outline(); outline.feed(web)
    assert not outline.open and outline.tags.count('svg') >= 8 and 'NaN' not in web and 'nan,' not in web
    outside = re.sub(r'^(`{3,})text\n.*?^\1$', '', md, flags=re.S | re.M)
    assert '<script' not in outside and '\n# not a heading' not in outside and '![x]' not in outside


def test_any_subset_of_the_records_gives_a_report(run):
    fill(run)
    everything = sorted(p for p in run.dir.rglob('*') if p.suffix in ('.json', '.jsonl'))
    for path in everything:  # each one missing, then each one damaged
        whole = path.read_bytes()
        path.unlink(); report.write_report(run)
        for damage in (b'{"stage": "sft", "acc', b'[]\n', b'\xff\xfe\x00'):
            path.write_bytes(damage)
            notes = report.write_report(run)['notes']
            assert path.name == 'metrics.jsonl' or any(path.name in note for note in notes), path
        path.write_bytes(whole)
    for path in everything: path.unlink()
    assert report.write_report(run)['scores'] == {}


def test_an_estimate_stands_beside_the_time_of_its_stage(run):
    fill(run)
    run.update_info(estimate=dict(base=100., rl=700., report=3.))
    report.write_report(run)
    text = written(run)[0].decode()
    assert '| base | 2 min 00 s | 1 min 40 s |' in text and '13 min 20 s for these stages, made before they began; they took 0.75 times that' in text
    assert '| mid | 4 min 00 s | – |' in text


def twin(run, name='twin'):
    "A second run with the same records"
    shutil.copytree(run.dir, Run(name).dir)
    return Run.open(name)


def change(run, *parts, **values): run.write_json(run.read_json(*parts) | values, *parts)


def test_only_what_differs_between_runs_is_listed_also_what_one_of_them_does_not_have(run):
    fill(run)
    other = twin(run)
    assert report.differences([report.read_records(each) for each in (run, other)])[1] == []
    change(other, 'stages', 'mid.json', options=dict(lr=.02, tasks=['GSM8K', 'MMLU'], mixture={'SmolTalk': 3, 'Facts': 1}))
    change(other, 'run.json', git=dict(commit='f00'))
    other.path('stages', 'rl.json').unlink()  # a stage that one of them has not reached is no difference
    header, rows = report.differences([report.read_records(each) for each in (run, other)])
    assert header == ['setting', 'card', 'twin']
    assert sorted(rows) == [['git.commit', '–', 'f00'], ['mid.mixture.Facts', '–', '1'], ['mid.tasks', 'GSM8K', 'GSM8K, MMLU']]


def test_runs_are_compared_question_by_question_where_both_kept_their_verdicts(run):
    fill(run)
    other = twin(run)
    exam = run.read_json('evals', 'sft_GSM8K.json')
    examples = [e | dict(correct=e['correct'] if i % 10 else not e['correct']) for i, e in enumerate(exam['examples'])]  # 4 gained, 6 lost
    change(other, 'evals', 'sft_GSM8K.json', accuracy=.58, examples=examples[::-1])
    change(other, 'evals', 'sft_ARC-Easy.json', accuracy=.7, examples=[e | dict(prompt='another question') for e in examples])
    header, rows = report.scores_beside([report.read_records(each) for each in (run, other)])
    cells = {(measure, stage): rest for measure, stage, *rest in rows}
    assert header[-1] == 'twin − card' and cells['GSM8K', 'SFT'] == ['0.6000 ± 0.0400', '0.5800 ± 0.0400', '-0.0200 ± 0.0316, 100 questions']
    assert cells['ARC-Easy', 'SFT'][-1] == '+0.1000 ± 0.0566' and cells['bits per byte, validation', 'BASE'][-1] == '+0.0000'
    other.path('evals', 'rl_GSM8K.json').unlink()
    assert ['GSM8K', 'RL', '0.9000 ± 0.0400', '', ''] in report.scores_beside([report.read_records(each) for each in (run, other)])[1]


def test_courses_and_costs_of_runs_in_any_state_stand_beside_each_other(run):
    fill(run)
    empty = Run.create('empty')
    for step in range(3): run.log('base', step, tokens=100 * step, train_seconds=.5 * step)
    many = [report.read_records(each) for each in (run, empty)]
    assert report.course(many[0]['metrics']['base'], 'loss', 'train_seconds') == [(0., 3.), (.5, 2.95), (1., 2.9)]
    lines = report.overlay(many, 'base').axes[0].lines
    assert [line.get_label() for line in lines] == ['card', 'empty'] and [*lines[0].get_xdata()] == [0, 100, 200] and not len(lines[1].get_xdata())
    assert report.overlay(many, 'sft') is None and report.overlay([many[1]], 'base') is None
    rows = {row[0]: row[1:] for row in report.costs_beside(many)[1]}
    assert rows['time of base'] == ['2 min 00 s', '–'] and rows['time in all'] == ['45 min 00 s', '0.0 s'] and rows['tokens in training'] == ['–', '–']


def test_verdicts_of_an_earlier_checkpoint_do_not_count(run):
    fill(run)
    kept = run.read_json('evals', 'sft_GSM8K.json')
    run.write_json({**kept, 'step': 4}, 'evals', 'sft_GSM8K.json')
    assert 'sft' not in report.write_report(run)['scores']['GSM8K']


def test_badges_need_two_standard_errors(run):
    fill(run)
    assert set(report.write_report(run)['badges']) == {'First words', 'Not guessing', 'Tool user', 'Finishing school', 'Self-taught', 'Speedrun', 'GPT-2 124M', 'GPT-2 355M', 'GPT-2 774M', 'd20', 'GPT-2 XL'}
    run.write_json({**run.read_json('evals', 'base_CORE.json'), 'tasks': {f't{i}': dict(accuracy=.42, centered=.2, n=2000, baseline=25.) for i in range(22)}}, 'evals', 'base_CORE.json')
    assert 'GPT-2 355M' in report.write_report(run)['badges'] and b'Next goal: GPT-2 774M (CORE above 0.2146; the published d20 got there in 3.9 hours' in written(run)[1]
    for stage in ('mid', 'sft', 'rl'):
        for task in ('GSM8K', 'ARC-Easy'):
            record = run.read_json('evals', f'{stage}_{task}.json')
            run.write_json({**record, 'accuracy': .28, 'stderr': .045, 'centered': .04}, 'evals', f'{stage}_{task}.json')
    assert not {'Not guessing', 'Finishing school', 'Self-taught'} & set(report.write_report(run)['badges'])


def test_published_chatcore_stands_only_beside_the_same_five_tasks(run):
    fill(run)
    row = lambda: next(r for r in report.score_table(report.read_records(run))[1] if r[0] == 'ChatCORE')
    assert row()[5:] == [''] * 4
    for stage, task in itertools.product(('mid', 'sft', 'rl'), ('ARC-Challenge', 'HumanEval', 'MMLU')):
        run.write_json({**run.read_json('evals', f'{stage}_GSM8K.json'), 'task': task}, 'evals', f'{stage}_{task}.json')
    assert row()[6:8] == ['0.0730', '0.0884']


def test_the_stage_runs_again_although_it_is_complete(run):
    fill(run)
    command = [sys.executable, '-m', 'nanochat.report', '--run', 'card', '--profile', 'kindergarten']
    if not report.profiles_dir().joinpath('kindergarten.yaml').exists(): pytest.skip('no profile yet')
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    before = written(run)
    second = subprocess.run(command, capture_output=True, text=True)
    assert 'skipped' not in second.stdout and written(run) == before
    assert run.record('report')['status'] == 'complete'


def test_the_little_worlds_scores_never_stand_beside_published_ones(run):
    fill(run)
    record = run.record('dataset')
    run.write_json({**record, 'options': dict(data='kindergarten')}, 'stages', 'dataset.json')
    report.write_report(run)
    header, _ = report.score_table(report.read_records(run))
    assert header == ['measure', 'BASE', 'MID', 'SFT', 'RL']
    assert not [badge for badge in report.write_report(run)['badges'] if 'GPT-2' in badge]
    assert 'not to be compared' in run.path('report.md').read_text()
