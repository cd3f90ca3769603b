"""The report card: from records alone, in any state of a run, the same bytes each time, safe with whatever a model wrote."""
import base64, contextlib, itertools, json, os, re, shutil, subprocess, sys, time, urllib.request
from html.parser import HTMLParser
from pathlib import Path

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


def test_every_measure_that_a_stage_has_logged_is_drawn_and_no_other(run):
    for step in range(3):
        run.log('base', step, loss=3. - step, mfu=.4, grad_norm=.5, lr=1., lr_matrices=.02, lr_embedding=.2, val_bpb=1. - step / 9)
        run.log('sft', step, loss=1., val_loss=.9 - step / 9, grad_norm=None, mfu=None)
        run.log('rl', step, reward=step / 3)
    records = report.read_records(run)
    labels = {stage: [block[1] for block in report.stage_blocks(dict(records, metrics={stage: records['metrics'][stage]})) if block[0] == 'curve'] for stage in ('base', 'sft', 'rl')}
    assert labels['base'] == [report.CURVES[name] for name in ('loss', 'val_bpb', 'lr', 'grad_norm', 'mfu')]
    assert labels['sft'] == [report.CURVES[name] for name in ('loss', 'val_loss')] and labels['rl'] == [report.CURVES['reward']]
    report.write_report(run)
    text = written(run)[0].decode()
    assert 'learning rate of the group matrices: 0.02' in text and 'learning rate of the group embedding: 0.2' in text


def test_the_price_that_was_noted_replaces_the_one_of_the_gpus(run):
    fill(run)
    assert report.totals(report.read_records(run))['price'] is None
    run.update_info(machine=run.info['machine'] | dict(gpus=['NVIDIA H100 80GB HBM3'] * 2))
    assert report.totals(report.read_records(run))['price'] == 6
    run.update_info(hourly_usd=2.5)
    report.write_report(run)
    assert '$1.88 at $2.50 an hour' in written(run)[0].decode()  # of 45 minutes


def test_the_next_goal_says_what_it_would_take_on_the_machine_of_the_run(run):
    fill(run)
    run.update_info(hourly_usd=24, estimate=dict(rl=600., eval_rl=300.), goals=dict(d20=14_000., d26=50_000., d30=100_000.))
    def goal(): return report.next_goal(report.read_records(run))
    assert goal().startswith('Next goal: d30 (MMLU above 0.40, ARC-Easy above 0.70, GSM8K above 0.20;') and goal().endswith('A d30 from the beginning would take about 27 h 46 min on the machine of this run, $666.67.')
    change(run, 'evals', 'base_CORE.json', tasks={f't{i}': dict(accuracy=.42, centered=.2, n=2000, baseline=25.) for i in range(22)})
    assert goal().startswith('Next goal: GPT-2 774M') and 'A d20 from the beginning would take about 3 h 53 min' in goal() and goal().endswith('$93.33.')
    for path in (run.path('stages', f'{name}.json') for name in ('rl', 'eval_rl')): path.unlink()
    for task in ('ARC-Easy', 'GSM8K'): run.path('evals', f'rl_{task}.json').unlink()
    assert goal().startswith('Next goal: Self-taught') and goal().endswith('The stages up to there (rl, eval_rl) would take about 15 min 00 s on the machine of this run, $6.00.')
    change(run, 'evals', 'sft_GSM8K.json', accuracy=0., centered=0.)  # finetuning did not help, and its stages are through
    change(run, 'evals', 'sft_ARC-Easy.json', accuracy=.35, centered=.13)
    assert goal().startswith('Next goal: Finishing school') and goal().endswith('Another run like this one, set otherwise, would take about 28 min 00 s on the machine of this run, $11.20.')
    change(run, 'evals', 'sft_GSM8K.json', accuracy=.6, centered=.6)
    change(run, 'evals', 'sft_ARC-Easy.json', accuracy=.6, centered=.47)
    run.update_info(goals=None, estimate=None)
    assert goal().endswith('improved word problems).')  # an older run: nothing is known, nothing is said


def test_the_level_of_d30_needs_all_three_of_its_published_scores(run):
    fill(run)
    for stage, right in dict(mid=.3, sft=.5, rl=.9).items():
        run.write_json({**run.read_json('evals', f'{stage}_GSM8K.json'), 'task': 'MMLU', 'accuracy': right}, 'evals', f'{stage}_MMLU.json')
    assert 'd30' in report.write_report(run)['badges']
    change(run, 'evals', 'rl_MMLU.json', accuracy=.45, stderr=.03)  # within two standard errors of 0.40
    assert 'd30' not in report.write_report(run)['badges']


def test_a_prompt_is_followed_from_the_base_model_on_where_it_was_asked(run):
    fill(run)
    change(run, 'evals', 'base_samples.json', samples=[dict(prompt='The', completion='sun'), dict(prompt=HOSTILE, completion='and so on')])
    blocks = report.sample_blocks(report.read_records(run))
    assert [block[1] for block in blocks if block[0] == 'code'] == ['user', 'BASE', 'MID', 'SFT', 'RL']
    assert next(block for block in blocks if block[0] == 'table')[2] == [['The', 'sun']]


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
    assert row()[6:] == [''] * 4
    for stage, task in itertools.product(('mid', 'sft', 'rl'), ('ARC-Challenge', 'HumanEval', 'MMLU')):
        run.write_json({**run.read_json('evals', f'{stage}_GSM8K.json'), 'task': task}, 'evals', f'{stage}_{task}.json')
    assert row()[7:9] == ['0.0730', '0.0884']


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
    assert header == ['measure', 'guessing', 'BASE', 'MID', 'SFT', 'RL']
    assert not [badge for badge in report.write_report(run)['badges'] if 'GPT-2' in badge]
    assert 'not to be compared' in run.path('report.md').read_text()


# --- in a browser ----------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)


@contextlib.contextmanager
def browser(url, folder):
    "A headless browser with a page, as a function that sends commands to its debugging port; no name resolves: the page must need no network"
    from websockets.sync.client import connect
    process = subprocess.Popen([BROWSER, '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--remote-debugging-port=0', f'--user-data-dir={folder}',
                                '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1', url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file, end = Path(folder, 'DevToolsActivePort'), time.time() + 60
        while not (port_file.exists() and len(port_file.read_text().split()) == 2) and time.time() < end: time.sleep(.1)
        listed = f'http://127.0.0.1:{port_file.read_text().split()[0]}/json'
        while not (pages := [t for t in json.load(urllib.request.urlopen(listed)) if t['type'] == 'page']) and time.time() < end: time.sleep(.1)
        with connect(pages[0]['webSocketDebuggerUrl'], max_size=2**26) as socket:
            numbers = itertools.count(1)
            def call(method, **params):
                number = next(numbers)
                socket.send(json.dumps(dict(id=number, method=method, params=params)))
                while (answer := json.loads(socket.recv(60))).get('id') != number: continue
                return answer['result']
            yield call
    finally: process.terminate(); process.wait(20)


LOOK = """(() => {
  if (document.readyState != 'complete' || !document.body || !document.querySelector('details')) return null;
  document.querySelectorAll('details').forEach(d => d.open = true);
  const style = e => getComputedStyle(document.querySelector(e)), light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number); return (.2126 * r + .7152 * g + .0722 * b) / 255 };
  const clipped = [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.wide')).map(e => e.tagName);
  return { paper: light(style('body').backgroundColor), ink: light(style('body').color), line: light(style('.curve .line').stroke), panel: light(style('pre').backgroundColor),
           wide: document.documentElement.scrollWidth, scores: (e => e.scrollWidth - e.clientWidth)(document.querySelectorAll('.wide')[1]), window: innerWidth, clipped, text: document.body.innerText, curves: document.querySelectorAll('svg.curve').length,
           errors: performance.getEntriesByType('resource').map(e => e.name) } })()"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason='no chromium or chrome on this machine')
@pytest.mark.parametrize('scheme, width', [('light', 1280), ('dark', 1280), ('light', 390), ('dark', 390)])
def test_the_page_is_readable_in_a_browser_by_day_and_night_and_on_a_phone(run, tmp_path, scheme, width):
    fill(run)
    for step in range(30): run.log('base', 30 + step, loss=1.5, grad_norm=.5, lr=1., lr_matrices=.02, mfu=.4)
    change(run, 'evals', 'sft_samples.json', samples=[dict(prompt='a_very_long_word_' * 30, completion='x' * 600)])
    report.write_report(run)
    with browser(run.path('report.html').as_uri(), tmp_path / 'browser') as call:
        call('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=scheme)])
        call('Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        end = time.time() + 30
        while not (seen := call('Runtime.evaluate', expression=LOOK, returnByValue=True)['result'].get('value')) and time.time() < end: time.sleep(.2)
        picture = Path(os.environ.get('NANOCHAT_SCREENSHOT', tmp_path)) / f'report-{scheme}-{width}.png'
        picture.write_bytes(base64.b64decode(call('Page.captureScreenshot', captureBeyondViewport=True)['data']))
    assert seen['window'] == width and seen['wide'] <= width and seen['clipped'] == []  # wide tables scroll on their own
    if width == 1280: assert seen['scores'] <= 0  # and the table of scores need not
    assert (seen['paper'] > .9 and seen['ink'] < .3) if scheme == 'light' else (seen['paper'] < .2 and seen['ink'] > .8)
    assert all(abs(seen[part] - seen['paper']) > .3 for part in ('ink', 'line')) and abs(seen['panel'] - seen['paper']) < .2
    assert seen['errors'] == [] and seen['curves'] >= 8 and 'Next goal' in seen['text'] and picture.stat().st_size > 20_000
