"""Describers that are models: six families through `from_pretrained`, on small checkpoints in the published layouts; questions, budgets, errors."""
import json, re, shutil, unicodedata

import numpy as np, pytest, torch, yaml
from hypothesis import example, given, strategies as st

from cmvc_nb import errors
from cmvc_nb.describers import ModelDescriber, PROMPTS, Prompts, clean_answer, fit_bytes, load_prompts
from cmvc_nb.errors import CmvcError
from cmvc_nb.representation import MeasuringDescriber
from dummies import moving_disc
from dummies_describers import DESCRIBE, FAMILIES, blip2

VIDEO = [k for k in FAMILIES if k != 'blip2']
TALK = Prompts('talk', keyframe=('What is it?', 'Say it in {words} words.'), motion=('What moves?', 'Say it in {words} words.'))
RNG = np.random.default_rng(0)
FRAMES = [moving_disc(3, 64, 0)[0], RNG.integers(0, 256, (64, 128, 3), dtype=np.uint8), moving_disc(3, 96, 2)[2]]
CLIPS = [moving_disc(17, 64, 0), moving_disc(5, 64, 1), RNG.integers(0, 256, (9, 64, 96, 3), dtype=np.uint8)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "The folder of one family, made once."
    made, top = {}, tmp_path_factory.mktemp('describers')
    def get(k):
        if k not in made: made[k] = FAMILIES[k](top/k)
        return made[k]
    return get


@pytest.fixture(scope='module')
def load(folder):
    "A describer of one family, loaded once; its settings are as at first."
    made = {}
    def get(k, **options):
        if k not in made: made[k] = ModelDescriber.from_pretrained(folder(k), TALK, max_new_tokens=8, **DESCRIBE[k])
        d = made[k]
        d.prompts, d.batch_size, d.frames, d.fps, d.max_new_tokens, d.generation, d.processing = TALK, 4, 8, 24., 8, {}, {}
        vars(d).update(options)
        return d
    return get


def heard(d, monkeypatch):
    "Record what reaches the model: (kind, texts, limit, inputs) of each round."
    log, answer, inputs = [], ModelDescriber._answer, ModelDescriber._inputs
    def _answer(self, kind, media, texts, limit): log.append([kind, list(texts), limit]); return answer(self, kind, media, texts, limit)
    def _inputs(self, *a): log[-1].append(inputs(self, *a)); return log[-1][-1]
    monkeypatch.setattr(ModelDescriber, '_answer', _answer); monkeypatch.setattr(ModelDescriber, '_inputs', _inputs)
    return log


# ---- every family

@pytest.mark.parametrize('k', FAMILIES)
def test_texts_come_out_batched_and_deterministic(load, k):
    "A batch says what each says alone, whatever the seed and the answers' lengths; the words are the model's."
    torch.manual_seed(1)
    a = load(k, batch_size=3)
    frames, clips = a.describe_keyframes(FRAMES, 40), a.describe_motions(CLIPS, 40)
    torch.manual_seed(2)
    assert load(k, batch_size=1).describe_keyframes(FRAMES, 40) == frames and a.describe_motions(CLIPS, 40) == clips
    assert len(set(frames)) == 3 and all(0 < len(t.encode()) <= 40 for t in frames + clips)
    assert not a.sees_video or len(set(clips)) == 3 and not set(clips) & set(MeasuringDescriber().describe_motions(CLIPS, 40))
    assert not [t for t in errors._SAID if 'no answer' in t] # the words are the model's


@pytest.mark.parametrize('k', FAMILIES)
def test_padded_rows_have_the_logits_of_single_ones(load, k):
    "Two talks of unlike length: the next token's logits are those of each alone."
    d = load(k)
    turns = [[['Is it?', None]], [['What is this, please?', 'A disc.'], ['Of which colour?', None]]]
    kind, media = ('motion', CLIPS[:2]) if d.sees_video else ('keyframe', FRAMES[:2])
    from cmvc_nb.describers import _as_chat, _by_template
    texts = [_by_template(d.template, kind, t) for t in turns] if d.template else d.processor.apply_chat_template([_as_chat(kind, t) for t in turns], tokenize=False, add_generation_prompt=True)
    def logits(m, t):
        with torch.inference_mode(): out = d.model.generate(**d._inputs(kind, m, t), generation_config=d._greedy(1), output_logits=True, return_dict_in_generate=True)
        return out.logits[0]
    both = logits(media, texts)
    mask = d._inputs(kind, media, texts)['attention_mask']
    assert (mask == 0).any() and mask[:, -1].all() # the shorter row is padded, and not at its end
    for i in (0, 1): torch.testing.assert_close(both[i], logits(media[i:i+1], texts[i:i+1])[0], rtol=1e-4, atol=1e-3)
    assert (both[0] - both[1]).abs().max() > .1


@pytest.mark.parametrize('k', FAMILIES)
def test_questions_and_history_reach_the_model(load, k, monkeypatch):
    "Each round holds the questions so far and the model's answers to them; the last round knows the budget."
    d = load(k, max_new_tokens=None, prompts=Prompts('three', ('First?', 'Second?', 'At most {words} words.'), ('x',)))
    log = heard(d, monkeypatch)
    monkeypatch.setattr('cmvc_nb.describers.ANSWER', 10)
    said = d.describe_keyframes(FRAMES[:2], 30)
    assert [(r[0], r[2]) for r in log] == [('keyframe', 10), ('keyframe', 10), ('keyframe', 26)]
    for r, (_, texts, _, inputs) in enumerate(log):
        for row, text in enumerate(texts):
            there = [text.find(q) for q in ('First?', 'Second?', 'At most 5 words.')]
            assert there[:r+1] == sorted(there[:r+1]) and min(there[:r+1]) >= 0 and set(there[r+1:]) <= {-1}
            if r: assert text.startswith(log[r-1][1][row].rstrip()) and len(text) > len(log[r-1][1][row]) + 10 # with an answer
            tokens = d.processor.tokenizer.decode(inputs['input_ids'][row])
            assert text[-18:] in tokens and all(q in tokens for q, at in zip(('First?', 'Second?', 'At most 5 words.'), there) if at >= 0)
    assert said[0] != said[1]
    other = load(k, prompts=Prompts('other', ('Which colours are there?',), ('x',))).describe_keyframes(FRAMES[:2], 30)
    assert not set(other) & set(load(k, prompts=Prompts('other', ('Where is it?',), ('x',))).describe_keyframes(FRAMES[:2], 30))


@pytest.mark.parametrize('k', VIDEO)
def test_the_clip_reaches_the_model(load, k, monkeypatch):
    "So many frames, evenly spaced, at their times; another clip, and the same backwards, gives other logits."
    d = load(k, frames=6, fps=4., prompts=Prompts('one', ('x',), ('Go.',)))
    seen, call = [], type(d.processor).__call__
    monkeypatch.setattr(type(d.processor), '__call__', lambda self, **a: (seen.append(a), call(self, **a))[1])
    def logits(c):
        log.clear(); d.describe_motions([c], 40)
        with torch.inference_mode(): return d.model(**log[0][3]).logits[0, -1]
    log = heard(d, monkeypatch)
    a = logits(CLIPS[0])
    clip, meta = seen[0]['videos'][0], seen[0]['videos_kwargs']['video_metadata'][0]
    assert meta == dict(total_num_frames=17, fps=4., duration=17/4, width=64, height=64, frames_indices=[0, 3, 6, 10, 13, 16]) and np.array_equal(clip, CLIPS[0][meta['frames_indices']])
    assert seen[0]['videos_kwargs']['do_sample_frames'] is False
    inputs = log[0][3]
    shown = inputs['pixel_values_videos' if 'pixel_values_videos' in inputs else 'pixel_values']
    grid = inputs.get('video_grid_thw')
    assert shown.shape[1] == 6 if grid is None else int(grid[0, 0]) in (3, 6) and len(shown) == int(grid.prod())
    for other in (CLIPS[0][::-1], CLIPS[1], CLIPS[2]): assert (logits(other) - a).abs().max() > .05
    assert torch.equal(logits(CLIPS[0].copy()), a)


def test_times_are_told(load, monkeypatch):
    "Families whose prompt names seconds name the right ones: frames 0 and 16 of 17 at 4 a second are 4 seconds apart."
    for k, want in dict(smolvlm2=['00:00', '00:04', 'six frames', '0:00:04'], video_llama3=['Time 0.0s', 'Time 4.0s'], qwen3_vl=['<0.4 seconds>', '<3.6 seconds>']).items():
        d = load(k, frames=6, fps=4.)
        text = d.processor.tokenizer.decode(d._inputs('motion', CLIPS[:1], d.processor.apply_chat_template(
            [[dict(role='user', content=[dict(type='video'), dict(type='text', text='Go.')])]], tokenize=False, add_generation_prompt=True))['input_ids'][0])
        assert all(w in text for w in want), (k, want, text)
    d = load('qwen2_5_vl', frames=8, fps=4.)
    assert float(d._inputs('motion', CLIPS[:1], ['<|vision_start|><|video_pad|><|vision_end|>'])['second_per_grid_ts'][0]) == pytest.approx(2*17/8/4)


def test_short_clips_repeat_frames(load, monkeypatch):
    d = load('video_llava')
    log = heard(d, monkeypatch)
    assert len(d.describe_motions([CLIPS[0][:1], CLIPS[0][:2], CLIPS[0]], 30)) == 3
    assert log[0][3]['pixel_values_videos'].shape == (3, 8, 3, 28, 28)


@pytest.mark.parametrize('k', FAMILIES)
def test_in_bfloat16(folder, k):
    "Pixels take the model's precision, times do not."
    d = ModelDescriber.from_pretrained(folder(k), Prompts('one', ('a',), ('b',)), torch_dtype=torch.bfloat16, max_new_tokens=3, **DESCRIBE[k]).to('cpu')
    assert d.model.dtype == torch.bfloat16 and d.describe_keyframes(FRAMES[:2], 20) and d.describe_motions(CLIPS[:2], 20)
    made = d._inputs('keyframe', FRAMES[:1], [d.template['keyframe']] if d.template else d.processor.apply_chat_template([[dict(role='user', content=[dict(type='image')])]], tokenize=False))
    assert {v.dtype for n, v in made.items() if n.startswith('pixel_values')} == {torch.bfloat16}
    if k == 'qwen2_5_vl': assert d._inputs('motion', CLIPS[:1], ['<|vision_start|><|video_pad|><|vision_end|>'])['second_per_grid_ts'].dtype == torch.float32


def test_batches(load, monkeypatch):
    "`batch_size` many at a time, at most."
    d = load('qwen3_vl', batch_size=2)
    log = heard(d, monkeypatch)
    assert len(d.describe_keyframes(np.stack([FRAMES[0]]*5), 20)) == 5
    assert [len(r[1]) for r in log] == [2, 2, 2, 2, 1, 1]
    assert d.describe_keyframes(FRAMES[:0], 20) == d.describe_motions([], 20) == []


# ---- greedy, whatever the checkpoint asks for

def test_shipped_sampling_is_overridden(load, folder):
    "generation_config.json asks for sampling and a penalty; the answer is the plain greedy one, token by token."
    d = load('qwen2_5_vl')
    assert json.loads((folder('qwen2_5_vl')/'generation_config.json').read_text())['do_sample'] is True
    text = ['<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n']
    inputs, ids = d._inputs('keyframe', FRAMES[:1], text), []
    for _ in range(8): # without a cache, and without generate()
        more = torch.tensor([ids], dtype=torch.long)
        grown = inputs | dict(input_ids=torch.cat([inputs['input_ids'], more], 1), attention_mask=torch.ones(1, inputs['input_ids'].shape[1] + len(ids), dtype=torch.long),
                              mm_token_type_ids=torch.cat([inputs['mm_token_type_ids'], torch.zeros_like(more)], 1))
        with torch.inference_mode(): ids.append(int(d.model(**grown).logits[0, -1].argmax()))
    with torch.inference_mode(): out = d.model.generate(**inputs, generation_config=d._greedy(8))[0, inputs['input_ids'].shape[1]:].tolist()
    assert out == ids[:len(out)] and len(out) > 3
    want = clean_answer(d.processor.tokenizer.decode(out, skip_special_tokens=True))
    assert d._answer('keyframe', FRAMES[:1], text, 8) == [want]
    d.generation = dict(repetition_penalty=3., do_sample=True, temperature=9.)  # a user may penalise, and cannot sample
    torch.manual_seed(0); other = d._answer('keyframe', FRAMES[:1], text, 8)
    torch.manual_seed(1); assert d._answer('keyframe', FRAMES[:1], text, 8) == other != [want]


def test_ends_where_the_checkpoint_says(load):
    "End and padding tokens come from generation_config.json, and stay over many calls."
    for _ in (1, 2): g = load('qwen3_vl')._greedy(5)
    n = load('qwen3_vl').processor.tokenizer.convert_tokens_to_ids
    assert g.eos_token_id == [n('<|im_end|>'), n('<|endoftext|>')] and g.pad_token_id == n('<|endoftext|>') and g.max_new_tokens == 5 and not g.do_sample
    assert load('blip2')._greedy(5).eos_token_id == load('blip2').processor.tokenizer.convert_tokens_to_ids('Ċ')


# ---- BLIP-2: no video, no chat

def test_without_video_motions_are_measured(load, capsys):
    d = load('blip2')
    assert not d.sees_video and d.describe_motions(CLIPS, 60) == MeasuringDescriber().describe_motions(CLIPS, 60) == d.describe_motions(CLIPS, 60)
    assert capsys.readouterr().err.count('sees no video') == 1


def test_a_template_without_motion_sees_no_video(folder, capsys):
    d = ModelDescriber.from_pretrained(folder('video_llava'), template=dict(keyframe='USER: <image>\n{prompt} ASSISTANT:'))
    assert d.describe_motions(CLIPS[:1]) == MeasuringDescriber().describe_motions(CLIPS[:1]) and 'sees no video' in capsys.readouterr().err


def test_plain_captions_and_encoder_decoders(folder, tmp_path, load):
    "BLIP-2 captions without a question; its sister with T5 repeats no question in its output."
    plain = ModelDescriber.from_pretrained(folder('blip2'), max_new_tokens=8, template=dict(keyframe=''))
    said = plain.describe_keyframes(FRAMES, 40)
    assert all(said) and set(said) != set(load('blip2').describe_keyframes(FRAMES, 40)) and said == [plain.describe_keyframes([f], 40)[0] for f in FRAMES]
    t5 = ModelDescriber.from_pretrained(blip2(tmp_path/'t5', t5=True), TALK, max_new_tokens=8, **DESCRIBE['blip2'])
    out = t5.describe_keyframes(FRAMES, 40)
    assert all(0 < len(t) <= 40 and 'uestion' not in t for t in out) and not errors._SAID


# ---- layouts and loading

@pytest.mark.parametrize('k', ['smolvlm2', 'blip2', 'qwen3_vl'])
def test_newly_saved_folders_load_too(load, folder, tmp_path, k):
    "What today's save_pretrained writes (one nested processor_config.json) says the same."
    d = load(k)
    d.model.save_pretrained(tmp_path); d.processor.save_pretrained(tmp_path)
    assert not (tmp_path/'preprocessor_config.json').exists()
    new = ModelDescriber.from_pretrained(tmp_path, TALK, max_new_tokens=8, **DESCRIBE[k])
    assert new.describe_keyframes(FRAMES, 40) == load(k).describe_keyframes(FRAMES, 40) and new.describe_motions(CLIPS[:1], 40) == load(k).describe_motions(CLIPS[:1], 40)


def test_missing_package_names_the_extra(folder, monkeypatch):
    monkeypatch.setattr('transformers.models.smolvlm.processing_smolvlm.num2words', None)
    with pytest.raises(CmvcError, match=r"num2words.*pip install 'cmvc_nb\[describers\]'") as e: ModelDescriber.from_pretrained(folder('smolvlm2'))
    assert '\n' not in str(e.value)


def broken(src, tmp_path, change):
    shutil.copytree(src, tmp_path/'x')
    change(tmp_path/'x')
    return tmp_path/'x'


def _only_pickle(f):
    for p in f.glob('*.safetensors*'): p.unlink()
    (f/'pytorch_model.bin').write_bytes(b'not to be opened')

def _without_lm_head(f):
    from safetensors.torch import load_file, save_file
    w = load_file(f/'model.safetensors'); w.pop('lm_head.weight'); save_file(w, f/'model.safetensors', metadata={'format': 'pt'})

def _config(**page): return lambda f: (f/'config.json').write_text(json.dumps(json.loads((f/'config.json').read_text()) | page))

@pytest.mark.parametrize('change,words', [
    (lambda f: (f/'config.json').unlink(), 'no config.json'),
    (lambda f: (f/'preprocessor_config.json').unlink(), 'no processor files'),
    (lambda f: (f/'tokenizer.json').unlink(), 'no tokenizer'),
    (lambda f: (f/'model.safetensors').unlink(), 'no safetensors'),
    (_only_pickle, 'pytorch_model.bin is a pickle, which is never opened'),
    (lambda f: (f/'config.json').write_text('{'), 'expected JSON'),
    (_config(model_type='videollama2_mistral', auto_map={'AutoConfig': 'a.B'}), 'code that a checkpoint brings is never run'),
    (_config(model_type='qwen2'), 'does not load'),
    (lambda f: (f/'model.safetensors').write_bytes(b'x'*100), 'does not load'),
    (_without_lm_head, '1 weights are missing, lm_head.weight'),
    (lambda f: (f/'chat_template.json').unlink(), 'no chat template: give one'),
], ids=range(11))
def test_folders_refused(folder, tmp_path, change, words):
    with pytest.raises(CmvcError, match=re.escape(words)) as e: ModelDescriber.from_pretrained(broken(folder('qwen3_vl'), tmp_path, change))
    assert '\n' not in str(e.value)


def test_code_of_a_checkpoint_is_not_run(folder, tmp_path, load):
    "A checkpoint of a known kind that brings Python beside its weights is loaded without it."
    f = broken(folder('qwen3_vl'), tmp_path, _config(auto_map={'AutoConfig': 'own.Own', 'AutoModelForImageTextToText': 'own.Own'}))
    (f/'own.py').write_text(f"open({str(tmp_path/'ran')!r}, 'w').close()\nclass Own: pass\n")
    assert ModelDescriber.from_pretrained(f, TALK, max_new_tokens=8).describe_keyframes(FRAMES[:1], 40) == load('qwen3_vl').describe_keyframes(FRAMES[:1], 40)
    assert not (tmp_path/'ran').exists()


def test_one_beginning(load):
    "A template that writes the token of the beginning itself does not get a second one."
    d = load('video_llava')
    a, b = (d._inputs('keyframe', FRAMES[:1], [t + 'USER: <image>\nGo. ASSISTANT:'])['input_ids'][0].tolist() for t in ('', '<s>'))
    bos = d.processor.tokenizer.bos_token_id
    assert a[0] == b[0] == bos and a.count(bos) == b.count(bos) == 1


def test_language_model_without_eyes(folder, tmp_path):
    "A folder that loads, but takes no pictures."
    f = broken(folder('qwen3_vl'), tmp_path, _config(model_type='qwen2'))
    for p in ('video_preprocessor_config.json',): (f/p).unlink()
    (f/'preprocessor_config.json').write_text('{}')
    with pytest.raises(CmvcError): ModelDescriber.from_pretrained(f)


@pytest.mark.parametrize('options,words', [
    (dict(frames=1), 'frames is 1'), (dict(batch_size=0), 'batch_size is 0'), (dict(max_new_tokens=-1), 'max_new_tokens is -1'), (dict(fps=0), 'fps is 0'),
    (dict(prompts='polite'), "no prompts 'polite': expected one of dialogue, plain"), (dict(template={'motion': 'x'}), 'expected texts under keyframe'),
    (dict(template='USER: {prompt}'), 'expected texts under keyframe'), (dict(prompts='dialogue', template={'keyframe': '{prompt}'}), 'needs a next'),
    (dict(template={'keyframe': '{prompt}', 'system': 'x'}), 'expected texts under keyframe'),
])
def test_options_refused(folder, options, words):
    with pytest.raises(CmvcError, match=re.escape(words)): ModelDescriber.from_pretrained(folder('qwen3_vl'), **options)


def test_a_template_without_the_image_is_refused(folder):
    d = ModelDescriber.from_pretrained(folder('video_llava'), template=dict(keyframe='USER: {prompt} ASSISTANT:'))
    with pytest.raises(CmvcError, match='refuses .*check template'): d.describe_keyframes(FRAMES[:1])


@pytest.mark.parametrize('budget', [0, -1, 1.5, True, '9'])
def test_budgets_refused(load, budget):
    for k in ('qwen3_vl', 'blip2'):
        with pytest.raises(CmvcError, match='budget'): load(k).describe_keyframes(FRAMES[:1], budget)
        with pytest.raises(CmvcError, match='budget'): load(k).describe_motions(CLIPS[:1], budget)


def test_frames_refused(load):
    for bad in (FRAMES[0].astype(float), FRAMES[0][..., :2]):
        with pytest.raises(CmvcError, match='expected uint8'): load('qwen3_vl').describe_keyframes([bad])


# ---- budgets, empty answers, control tokens

def test_budgets_are_kept(load):
    d = load('video_llama3', max_new_tokens=None, prompts=Prompts('one', ('Go.',), ('Go.',)))
    for b in (1, 2, 7, 30): assert all(0 < len(t.encode()) <= b for t in d.describe_keyframes(FRAMES[:2], b) + d.describe_motions(CLIPS[:2], b))
    d.max_new_tokens = 40
    assert len(d.describe_keyframes(FRAMES[:1])[0]) > 15 # without a budget nothing is cut


def test_empty_answers_are_measured(load, monkeypatch, capsys):
    d = load('qwen3_vl')
    monkeypatch.setattr(d.processor.tokenizer, 'batch_decode', lambda out, **k: ['A disc.', '<think>It is hard to say', ' \n '][:len(out)])
    assert d.describe_keyframes(FRAMES, 30) == ['A disc.'] + MeasuringDescriber().describe_keyframes(FRAMES[1:], 30)
    assert d.describe_motions(CLIPS, 30) == ['A disc.'] + MeasuringDescriber().describe_motions(CLIPS[1:], 30)
    err = capsys.readouterr().err
    assert err.count('no answer about a keyframe') == 1 and err.count('no answer about a motion') == 1


@pytest.mark.parametrize('k', FAMILIES)
def test_an_answer_cannot_ask_for_a_picture(load, k, monkeypatch):
    "A frame may show the word <image>, and a model may read it aloud; in the next round it is no control token."
    d = load(k)
    tokens = [str(getattr(d.processor, 'image_token', '')), str(getattr(d.processor, 'video_token', '')), d.processor.tokenizer.eos_token]
    monkeypatch.setattr(d.processor.tokenizer, 'batch_decode', lambda out, **o: [f"A {' '.join(tokens)} kite"]*len(out))
    assert d.describe_keyframes(FRAMES[:1], 30) == ['A kite']
    assert not d.sees_video or d.describe_motions(CLIPS[:1], 30) == ['A kite']


def test_clean_answer():
    assert clean_answer(' A\nred\t disc. \x00\ufffd') == 'A red disc.'
    assert clean_answer('<think>a</think>b<think>c</think> d') == 'b d' and clean_answer('a</think>b') == 'b' and clean_answer('b <think>c') == 'b' and clean_answer('<think>\n</think>\n') == ''
    assert clean_answer('x<image>y<|im_end|>', ['<image>', '<|im_end|>', '']) == 'x y' and clean_answer('<im<image>age>', ['<image>']) == '<im age>'


@given(st.text(), st.integers(1, 80))
@example('日本語です。また', 14)
@example('e\u0301e\u0301', 4)
@example('\ud800abc', 2)
@example(' \n', 1)
def test_fit_bytes_is_a_start_that_fits(text, budget):
    whole, cut = fit_bytes(text), fit_bytes(text, budget)
    assert len(cut.encode()) <= budget and whole.startswith(cut) and cut == cut.strip()
    if len(whole.encode()) <= budget: assert cut == whole
    assert fit_bytes(cut, budget) == cut and whole == text.encode('utf-8', 'replace').decode().strip()
    if len(cut) < len(whole): assert unicodedata.category(whole[len(cut)])[0] != 'M' or not cut


WORDS = st.lists(st.text('abcdé', min_size=1, max_size=9), min_size=1, max_size=30)

@given(WORDS, st.integers(1, 120))
def test_fit_bytes_cuts_between_words(words, budget):
    "As many whole words as fit; a piece of the first where it alone is too long."
    n = max(i for i in range(len(words)+1) if len(' '.join(words[:i]).encode()) <= budget)
    cut = fit_bytes(' '.join(words), budget)
    assert cut == ' '.join(words[:n]) if n else words[0].startswith(cut)


@given(st.lists(WORDS, min_size=1, max_size=6), st.integers(1, 200), st.sampled_from(['.', '!', '?', '…', '."']))
def test_fit_bytes_prefers_sentences(sentences, budget, stop):
    "Where whole sentences fill half of what fits, nothing else is kept."
    text = ' '.join(' '.join(s) + stop for s in sentences)
    cut = fit_bytes(text, budget)
    fits = len(text.encode()[:budget].decode(errors='ignore'))
    ends = [m.end() for m in re.finditer(re.escape(stop) + r'(?= |$)', text) if fits/2 < m.end() <= fits]
    if ends: assert cut == text[:ends[-1]]
    elif len(cut) < len(text): assert not cut.endswith(stop) or len(cut) <= fits/2 or cut == text[:len(cut)]


def test_fit_bytes_by_hand():
    s = 'A red kite hangs in a pale sky. Below it, on the beach, two children run.'
    assert [fit_bytes(s, b) for b in (73, 72, 60, 45, 31, 30, 12, 1)] == [s, 'A red kite hangs in a pale sky. Below it, on the beach', 'A red kite hangs in a pale sky.', 'A red kite hangs in a pale sky.', 'A red kite hangs in a pale sky.',
                                                                        'A red kite hangs in a pale', 'A red kite', 'A']
    assert fit_bytes('It costs 3.14 dollars today', 15) == 'It costs 3.14' and fit_bytes('👩‍👩‍👧 family', 12) == '' and fit_bytes('海は青い。空も青い。', 20) == '海は青い。'
    for bad in (0, -3, 2.5, True):
        with pytest.raises(CmvcError, match='budget'): fit_bytes('x', bad)


# ---- pages of questions

def test_shipped_pages():
    pages = {p.stem: load_prompts(p.stem) for p in PROMPTS.glob('*.yaml')}
    assert set(pages) >= {'plain', 'dialogue'} and all(p.name == k and p.about and p.version >= 1 for k, p in pages.items())
    assert all('{words}' in p.keyframe[-1] and '{words}' in p.motion[-1] for p in pages.values()) # the round that is sent knows the budget
    assert (len(pages['plain'].keyframe), len(pages['plain'].motion)) == (1, 1) and min(len(pages['dialogue'].keyframe), len(pages['dialogue'].motion)) > 2


def test_own_page(tmp_path, load, monkeypatch):
    page = dict(name='mine', keyframe=['Was siehst du? Höchstens {words} Wörter.'], motion=['Was bewegt sich?'])
    (tmp_path/'mine.yaml').write_text(yaml.safe_dump(page, allow_unicode=True), encoding='utf-8')
    d = load('smolvlm2', prompts=load_prompts(tmp_path/'mine.yaml'))
    log = heard(d, monkeypatch)
    d.describe_keyframes(FRAMES[:1], 60)
    assert 'Höchstens 10 Wörter.' in log[0][1][0] and load_prompts(d.prompts) is d.prompts


GOOD = dict(name='x', keyframe=['a'], motion=['b'])

@pytest.mark.parametrize('page,words', [
    ({k: v for k, v in GOOD.items() if k != 'motion'}, 'expected name, keyframe and motion'), (GOOD | dict(colour='red'), 'expected name'), ('a text', 'expected name'),
    (GOOD | dict(keyframe='a'), 'keyframe is no list of questions'), (GOOD | dict(motion=[]), 'motion is no list'), (GOOD | dict(motion=['']), 'motion is no list'), (GOOD | dict(keyframe=[3]), 'keyframe is no list'),
    (GOOD | dict(keyframe=['in {word} words']), 'keyframe has {word}'), (None, 'cannot be read'), (b'\xff\xfe', 'expected YAML'), (b'a: [', 'expected YAML'),
], ids=range(11))
def test_pages_refused(tmp_path, page, words):
    path = tmp_path/'page.yaml'
    if isinstance(page, bytes): path.write_bytes(page)
    elif page is not None: path.write_text(yaml.safe_dump(page))
    with pytest.raises(CmvcError, match=re.escape(words)) as e: load_prompts(path)
    assert str(path) in str(e.value) and '\n' not in str(e.value)


# ---- as part of a preset

def test_a_preset_names_it(tmp_path):
    "The same road as every other part: role, folder, options on the page; the codec writes what the model says."
    from cmvc_nb.bitstream import keyframe_text, open_cmvc
    from cmvc_nb.codec import Codec
    from cmvc_nb.world import video
    from dummies_models import make_dummy_preset
    page = make_dummy_preset(tmp_path/'p'); FAMILIES['smolvlm2'](tmp_path/'p'/'vlm')
    d = yaml.safe_load(page.read_text()); d['parts']['describer'] = 'vlm'; d['describe'] = dict(prompts='dialogue', frames=4, batch_size=2)
    page.write_text(yaml.safe_dump(d))
    codec, clip = Codec.from_pretrained(page, 'cpu'), video(0, 9, 64, kind='pan')[0]
    assert type(codec.models.describer) is ModelDescriber and codec.models.describer.batch_size == 2 and codec.models.describer.prompts.name == 'dialogue'
    w = codec.describe(clip, interval=4, selection='uniform', size=64, text_budget=40, motion_budget=30)
    assert max(len(t.encode()) for t in w.texts) <= 40 and max(len(t.encode()) for t in w.motions) <= 30 and all(w.texts + w.motions)
    with open_cmvc(codec.encode(clip, mode='tt2v', interval=4, selection='uniform', text_budget=40, motion_budget=30, size=64, steps=2, seed=0).data) as r:
        assert [keyframe_text(r, k) for k in range(3)] == w.texts
    (tmp_path/'p'/'mine.yaml').write_text('name: mine\nkeyframe: [What is it]\nmotion: [Where is it]'); d['describe']['prompts'] = 'mine.yaml'; page.write_text(yaml.safe_dump(d)) # beside the page
    mine = Codec.from_pretrained(page, 'cpu'); mine.describe(clip, interval=4, size=64, fps=12.5)
    assert mine.models.describer.prompts.name == 'mine' and mine.models.describer.fps == 12.5
    (tmp_path/'p'/'vlm'/'config.json').unlink()
    with pytest.raises(CmvcError, match='describer in .* has no config.json'): Codec.from_pretrained(page, 'cpu').models.describer
