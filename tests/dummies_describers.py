"""Vision-language models of two layers and a few channels, in the file layouts that the published ones have on the hub."""
import json, re
from pathlib import Path

from dummies import _seeded

LETTERS = ['Ġ', 'Ċ', *map(chr, range(33, 127))]                       # printable ASCII, a space and a new line, as byte-level BPE writes them
QWEN = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>', '<|vision_pad|>', '<|image_pad|>', '<|video_pad|>']
SMOL = ['<|im_start|>', '<|im_end|>', '<end_of_utterance>', '<fake_token_around_image>', '<image>', '<global-img>', *(f'<row_{r}_col_{c}>' for r in (1, 2) for c in (1, 2))]
TEXT = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, initializer_range=.5)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=.5)

# minimal chat templates: the published ones, without tools, system prompts and numbering
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% elif c.type == 'video' %}VIDEO{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
UTTERANCES = """<|im_start|>{% for m in messages %}{{ m.role | capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% else %}{{ '<' + c.type + '>' }}{% endif %}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""
QWEN_CHAT = CHATML.replace('IMAGE', '<|vision_start|><|image_pad|><|vision_end|>').replace('VIDEO', '<|vision_start|><|video_pad|><|vision_end|>')


def _json(folder, name, d): (folder/name).write_text(json.dumps(d, indent=2))
def _ids(words): return {w: i for i, w in enumerate(words)}


def _rename(folder, old, new):
    from safetensors.torch import load_file, save_file
    for p in folder.glob('*.safetensors'): save_file({re.sub(old, new, k): v for k, v in load_file(p).items()}, p, metadata={'format': 'pt'})
    index = json.loads((folder/'model.safetensors.index.json').read_text())
    _json(folder, 'model.safetensors.index.json', index | dict(weight_map={re.sub(old, new, k): v for k, v in index['weight_map'].items()}))


def _parts(folder, model, tokenizer, processor, image, video=None, generation=None, shards=False):
    "The files in common: weights, config.json, generation_config.json, tokenizer files, preprocessor_config.json, video_preprocessor_config.json."
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, **(dict(max_shard_size='40KB') if shards else {}))
    if generation: _json(folder, 'generation_config.json', generation)
    tokenizer.save_pretrained(folder)
    if image: _json(folder, 'preprocessor_config.json', {**image.to_dict(), 'processor_class': processor})
    if video: _json(folder, 'video_preprocessor_config.json', {**video.to_dict(), 'processor_class': processor})
    return folder


def video_llava(folder, seed=0):
    "LanguageBind/Video-LLaVA-7B-hf: no chat template, no processor_config.json, shards."
    from transformers import CLIPVisionConfig, LlamaConfig, LlamaTokenizer, VideoLlavaConfig, VideoLlavaForConditionalGeneration, VideoLlavaImageProcessor
    words = ['<unk>', '<s>', '</s>', '<0x0A>', '▁', *map(chr, range(33, 127))]
    tokenizer = LlamaTokenizer(vocab=_ids(words), merges=[], add_bos_token=True, pad_token='<pad>', extra_special_tokens=['<image>', '<video>'])
    n = {t: tokenizer.convert_tokens_to_ids(t) for t in ('<image>', '<video>', '<pad>')}
    config = VideoLlavaConfig(vision_config=CLIPVisionConfig(**VISION, image_size=28, patch_size=14, projection_dim=16, initializer_factor=4.).to_dict(),
                              text_config=LlamaConfig(vocab_size=len(tokenizer), **TEXT, pad_token_id=n['<pad>'], bos_token_id=1, eos_token_id=2).to_dict(),
                              image_token_index=n['<image>'], video_token_index=n['<video>'], image_seq_length=4, video_seq_length=20)
    image = VideoLlavaImageProcessor(size={'shortest_edge': 28}, crop_size={'height': 28, 'width': 28})
    folder = _parts(Path(folder), _seeded(seed, lambda: VideoLlavaForConditionalGeneration(config)), tokenizer, 'VideoLlavaProcessor', image, shards=True,
                    generation=dict(_from_model_config=True, bos_token_id=1, eos_token_id=2, pad_token_id=n['<pad>']))
    _rename(folder, r'^(image_tower|video_tower)\.', r'\1.vision_model.') # as the towers' weights are called on the hub
    return folder


def _qwen_tokenizer(specials=QWEN):
    from transformers import Qwen2Tokenizer
    return Qwen2Tokenizer(vocab=_ids(LETTERS), merges=[], eos_token='<|im_end|>', pad_token='<|endoftext|>', extra_special_tokens=[t for t in specials if t not in ('<|endoftext|>', '<|im_end|>')])


def _sampling(tokenizer): # what Qwen's generation_config.json asks for
    eos, pad = map(tokenizer.convert_tokens_to_ids, ('<|im_end|>', '<|endoftext|>'))
    return dict(bos_token_id=pad, pad_token_id=pad, do_sample=True, eos_token_id=[eos, pad], repetition_penalty=1.5, temperature=5., top_k=50, top_p=.9)


def video_llama3(folder, seed=0):
    "lkhl/VideoLLaMA3-2B-Image-HF: chat_template.jinja, two preprocessor files, one file of weights."
    from transformers import Qwen2Config, VideoLlama3Config, VideoLlama3ForConditionalGeneration, VideoLlama3ImageProcessor, VideoLlama3VideoProcessor
    tokenizer = _qwen_tokenizer()
    n = tokenizer.convert_tokens_to_ids
    text = Qwen2Config(vocab_size=len(tokenizer), **TEXT, tie_word_embeddings=True, pad_token_id=n('<|endoftext|>'), eos_token_id=n('<|im_end|>'))
    config = VideoLlama3Config(text_config=text.to_dict(), vision_config=dict(**VISION, patch_size=14), image_token_id=n('<|image_pad|>'), video_token_id=n('<|video_pad|>'))
    size = dict(shortest_edge=28*28, longest_edge=8*56*56)
    folder = _parts(Path(folder), _seeded(seed, lambda: VideoLlama3ForConditionalGeneration(config)), tokenizer, 'VideoLlama3Processor',
                    VideoLlama3ImageProcessor(size=dict(shortest_edge=28*28, longest_edge=56*56)), VideoLlama3VideoProcessor(size=size, merge_size=2, use_token_compression=True), _sampling(tokenizer))
    (folder/'chat_template.jinja').write_text(CHATML.replace('IMAGE', '<|image_pad|>\n').replace('VIDEO', '<|video_pad|>\n'))
    return folder


def qwen3_vl(folder, seed=0):
    "Qwen/Qwen3-VL-2B-Instruct: chat_template.json, two preprocessor files, thoughts in <think>."
    from transformers import Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLVideoProcessor
    tokenizer = _qwen_tokenizer()
    n = tokenizer.convert_tokens_to_ids
    tokenizer.add_tokens(['<think>', '</think>'])
    config = Qwen3VLConfig(
        text_config=dict(vocab_size=len(tokenizer), **TEXT, head_dim=16, pad_token_id=n('<|endoftext|>'), rope_parameters=dict(rope_type='default', rope_theta=5e6, mrope_section=[4, 2, 2], mrope_interleaved=True)),
        vision_config=dict(depth=2, hidden_size=16, intermediate_size=16, num_heads=2, patch_size=16, out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0], initializer_range=.5),
        image_token_id=n('<|image_pad|>'), video_token_id=n('<|video_pad|>'), vision_start_token_id=n('<|vision_start|>'), vision_end_token_id=n('<|vision_end|>'))
    shape = dict(patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[.5]*3, image_std=[.5]*3)
    folder = _parts(Path(folder), _seeded(seed, lambda: Qwen3VLForConditionalGeneration(config)), tokenizer, 'Qwen3VLProcessor',
                    Qwen2VLImageProcessor(size=dict(shortest_edge=32*32, longest_edge=64*64), **shape), Qwen3VLVideoProcessor(size=dict(shortest_edge=32*32, longest_edge=8*64*64), **shape), _sampling(tokenizer))
    _json(folder, 'chat_template.json', dict(chat_template=QWEN_CHAT))
    return folder


def qwen2_5_vl(folder, seed=1):
    "Qwen/Qwen2.5-VL-3B-Instruct: chat_template.json, one preprocessor file for images and videos, shards."
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor
    tokenizer = _qwen_tokenizer()
    n = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(tokenizer), **TEXT, pad_token_id=n('<|endoftext|>'), bos_token_id=n('<|endoftext|>'), eos_token_id=n('<|im_end|>'), rope_parameters=dict(type='mrope', mrope_section=[4, 2, 2])),
        vision_config=dict(depth=2, hidden_size=16, intermediate_size=16, num_heads=2, patch_size=14, out_hidden_size=32, fullatt_block_indexes=[1], window_size=56, initializer_range=.5),
        image_token_id=n('<|image_pad|>'), video_token_id=n('<|video_pad|>'), vision_start_token_id=n('<|vision_start|>'), vision_end_token_id=n('<|vision_end|>'))
    folder = _parts(Path(folder), _seeded(seed, lambda: Qwen2_5_VLForConditionalGeneration(config)), tokenizer, 'Qwen2_5_VLProcessor', None, generation=_sampling(tokenizer), shards=True)
    _json(folder, 'preprocessor_config.json', dict(min_pixels=28*28, max_pixels=56*56, patch_size=14, temporal_patch_size=2, merge_size=2, image_mean=[.5]*3, image_std=[.5]*3,
                                                   image_processor_type='Qwen2VLImageProcessor', processor_class='Qwen2_5_VLProcessor'))
    _json(folder, 'chat_template.json', dict(chat_template=QWEN_CHAT))
    return folder


def smolvlm2(folder, seed=0):
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct: chat_template.json, processor_config.json with one number, preprocessor_config.json with video_sampling."
    from transformers import GPT2Tokenizer, SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessor
    tokenizer = GPT2Tokenizer(vocab=_ids(LETTERS), merges=[], unk_token='<|endoftext|>', bos_token='<|im_start|>', eos_token='<end_of_utterance>', pad_token='<|im_end|>',
                              extra_special_tokens=[t for t in SMOL if t not in ('<|im_start|>', '<end_of_utterance>', '<|im_end|>')])
    n = tokenizer.convert_tokens_to_ids
    text = dict(vocab_size=len(tokenizer), model_type='llama', **TEXT, pad_token_id=n('<|im_end|>'), bos_token_id=n('<|im_start|>'), eos_token_id=n('<end_of_utterance>'))
    config = SmolVLMConfig(text_config=text, vision_config=dict(**VISION, image_size=32, patch_size=8), image_token_id=n('<image>'), scale_factor=2)
    edge = lambda v: {'longest_edge': v}
    image = SmolVLMImageProcessor(size=edge(64), max_image_size=edge(32))
    folder = _parts(Path(folder), _seeded(seed, lambda: SmolVLMForConditionalGeneration(config)), tokenizer, 'SmolVLMProcessor', image,
                    generation=dict(_from_model_config=True, bos_token_id=n('<|im_start|>'), eos_token_id=n('<end_of_utterance>'), pad_token_id=n('<|im_end|>')))
    page = json.loads((folder/'preprocessor_config.json').read_text())
    _json(folder, 'preprocessor_config.json', {**page, 'video_sampling': dict(fps=1, max_frames=8, video_size=edge(32))})
    _json(folder, 'processor_config.json', dict(image_seq_len=4, processor_class='SmolVLMProcessor'))
    _json(folder, 'chat_template.json', dict(chat_template=UTTERANCES))
    return folder


def blip2(folder, seed=0, t5=False):
    "Salesforce/blip2-opt-2.7b (or its sister blip2-flan-t5-xl, an encoder-decoder): no chat template, no video, processor_config.json with one number, safetensors beside pickles."
    from tokenizers.processors import TemplateProcessing
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, BlipImageProcessor, GPT2Tokenizer, OPTConfig, T5Config
    tokenizer = GPT2Tokenizer(vocab=_ids(['<pad>', '</s>', *LETTERS]), merges=[], unk_token='</s>', bos_token='</s>', eos_token='</s>', pad_token='<pad>', extra_special_tokens=['<image>'])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single='</s> $A', special_tokens=[('</s>', 1)])
    line = tokenizer.convert_tokens_to_ids('Ċ')
    text = OPTConfig(vocab_size=len(tokenizer), hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32, max_position_embeddings=2048, init_std=.5,
                     pad_token_id=0, bos_token_id=1, eos_token_id=line)
    if t5: text = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, initializer_factor=3., pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    config = Blip2Config(vision_config=Blip2VisionConfig(**{**VISION, 'initializer_range': .3}, image_size=28, patch_size=14).to_dict(), text_config=text.to_dict(), num_query_tokens=3, image_token_index=tokenizer.convert_tokens_to_ids('<image>'),
                         qformer_config=Blip2QFormerConfig(vocab_size=len(tokenizer), **{**VISION, 'initializer_range': .3}, encoder_hidden_size=16).to_dict(), initializer_range=.3)
    folder = _parts(Path(folder), _seeded(seed, lambda: Blip2ForConditionalGeneration(config)), tokenizer, 'Blip2Processor', BlipImageProcessor(size=dict(height=28, width=28)), shards=True,
                    generation=dict(_from_model_config=True, pad_token_id=0, **(dict(decoder_start_token_id=0, eos_token_id=1) if t5 else dict(bos_token_id=1, eos_token_id=line))))
    _json(folder, 'processor_config.json', dict(num_query_tokens=3, processor_class='Blip2Processor'))
    (folder/'pytorch_model-00001-of-00002.bin').write_bytes(b'not to be opened')
    return folder


FAMILIES = dict(video_llava=video_llava, video_llama3=video_llama3, qwen3_vl=qwen3_vl, qwen2_5_vl=qwen2_5_vl, smolvlm2=smolvlm2, blip2=blip2)
# what the preset of each must say under `describe:`
DESCRIBE = {k: {} for k in FAMILIES} | dict(
    video_llava=dict(template=dict(keyframe='USER: <image>\n{prompt} ASSISTANT:', motion='USER: <video>\n{prompt} ASSISTANT:', next=' {answer}</s>USER: {prompt} ASSISTANT:')),
    blip2=dict(template=dict(keyframe='Question: {prompt} Answer:', next=' {answer} Question: {prompt} Answer:')))
