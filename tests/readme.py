"""README.md from nbs/index.ipynb, without quarto: `python tests/readme.py` writes it, test_repo.py holds it in step."""
import json, re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

def _link(m):
    "A link that is relative to nbs/ becomes relative to the top folder."
    pre, target = m.groups()
    if re.match(r'[a-z]+:|#|/', target): return m.group(0)
    return pre + (target[3:] if target.startswith('../') else f'nbs/{target}')

def _relink(md): # markdown and html targets, outside code
    parts = re.split(r'(```.*?```|`[^`]*`)', md, flags=re.S)
    parts[::2] = [re.sub(r'(\]\(|src="|href=")([^)"\s]+)', _link, p) for p in parts[::2]]
    return ''.join(parts)

def _output(o):
    "One saved output as markdown; '' for what has no text."
    if o['output_type'] == 'stream': return _fence(''.join(o['text'])) if o['name'] == 'stdout' else ''
    data = o.get('data', {})
    if any(k.startswith('image/') for k in data): raise ValueError('index.ipynb holds a picture as output: save it in nbs/images and link it')
    for kind in ('text/markdown', 'text/html'):
        if kind in data: return _relink(''.join(data[kind]))
    return _fence(''.join(data.get('text/plain', '')))

def _fence(text, lang=''): return f'```{lang}\n{text.rstrip()}\n```' if text.strip() else ''

def _code(cell):
    "Source and outputs of a code cell, with quarto's `echo`, `output` and `include` and nbdev's `hide` obeyed."
    lines = ''.join(cell['source']).splitlines()
    flags = {l[2:].strip() for l in lines if l.startswith('#|')}
    if flags & {'hide', 'include: false'}: return []
    src = '\n'.join(l for l in lines if not l.startswith('#|')).strip('\n')
    shown = [] if 'echo: false' in flags else [_fence(src, 'python')]
    return shown + ([] if 'output: false' in flags else [_output(o) for o in cell['outputs']])

def readme(nb_path=ROOT/'nbs'/'index.ipynb')->str: # the whole of README.md
    "The notebook as markdown, links made relative to the top folder."
    cells = json.loads(Path(nb_path).read_text(encoding='utf-8'))['cells']
    blocks = ['<!-- Made from nbs/index.ipynb by `make readme`; edit there. -->']
    for c in cells:
        if c['cell_type'] == 'markdown': blocks.append(_relink(''.join(c['source'])).strip('\n'))
        elif c['cell_type'] == 'code': blocks += _code(c)
    return '\n\n'.join(b for b in blocks if b) + '\n'

if __name__ == '__main__': (ROOT/'README.md').write_text(readme(), encoding='utf-8')
