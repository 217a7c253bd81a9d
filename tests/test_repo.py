"""The repository as a whole: notebooks, modules, packaging, site and README in step with one another."""
import ast, base64, configparser, importlib.metadata as md, json, os, re, shutil, subprocess, sys, zipfile
from email.parser import Parser
from pathlib import Path

import pytest, yaml

from readme import ROOT, readme

MiB = 2**20


def tracked():
    "Files of the project that exist, relative to the top: git's list, or all files where git does not know the folder."
    try: names = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split('\0')
    except (OSError, subprocess.CalledProcessError):
        skip = {'.git', '.venv', '_proc', '_docs', 'build', 'dist', 'demo', '__pycache__'}
        names = [p.relative_to(ROOT).as_posix() for p in ROOT.rglob('*') if not skip & set(p.relative_to(ROOT).parts)]
    return [n for n in sorted(names) if (ROOT/n).is_file()]


FILES = tracked()
NOTEBOOKS = [n for n in FILES if re.fullmatch(r'nbs/[^/]+\.ipynb', n)]
MODULES = [n for n in FILES if re.fullmatch(r'cmvc_nb/(.+/)?[^/]+\.py', n)]
PLAIN = [m for m in MODULES if not Path(m).name.startswith('_')]  # what notebooks export
INI = configparser.ConfigParser()
INI.read(ROOT/'settings.ini', encoding='utf-8')
CFG = INI['DEFAULT']


def stem(n): return Path(n).name
def cells(n): return json.loads((ROOT/n).read_text(encoding='utf-8'))['cells']
def source(c): return ''.join(c['source'])
def directives(c): return set(re.findall(r'^#\|\s*(\S+)', source(c), re.M))
def code_cells(n): return [c for c in cells(n) if c['cell_type'] == 'code']
def parsed(c): return ast.parse(re.sub(r'^\s*[%!].*$', '', source(c), flags=re.M))
def exported(n): return [c for c in code_cells(n) if directives(c) & {'export', 'exports', 'exporti'}]


def imports(tree):
    "Top names of the packages that `tree` imports, wherever it does so."
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): yield from (a.name.split('.')[0] for a in n.names)
        elif isinstance(n, ast.ImportFrom) and not n.level: yield n.module.split('.')[0]


@pytest.fixture(scope='session')
def copy(tmp_path_factory):
    "A copy of the tracked files, so that nbdev and setuptools may write."
    top = tmp_path_factory.mktemp('copy')/'repo'
    for n in FILES:
        (top/n).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/n, top/n, follow_symlinks=False)
    return top


def python(code, cwd, **env):
    "Run `code` in a new interpreter whose `cmvc_nb` is the one in `cwd`; its output, or the whole of it as a failure."
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'VIRTUAL_ENV')} | dict(PYTHONPATH=str(cwd), OMP_NUM_THREADS='1') | env
    r = subprocess.run([sys.executable, '-c', code], cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert r.returncode == 0, r.stdout + r.stderr
    return r.stdout + r.stderr


# ---- notebooks and modules

def test_modules_in_step(copy):
    "Exporting every notebook into an empty package gives the modules as they are, and no other."
    for n in PLAIN: (copy/n).unlink()
    python('from nbdev.doclinks import nbdev_export; nbdev_export()', copy)
    made = {p.relative_to(copy).as_posix() for p in (copy/'cmvc_nb').rglob('*.py')}
    fresh = {n for n in made if not Path(n).name.startswith('_')}
    stale = [n for n in PLAIN if n not in fresh or (copy/n).read_bytes() != (ROOT/n).read_bytes()]
    for n in PLAIN: shutil.copy2(ROOT/n, copy/n)
    assert not fresh - set(PLAIN), f'exported but not in git: {sorted(fresh - set(PLAIN))}; git add them'
    assert not stale, f'not what the notebooks export (or no notebook exports them): {stale}; run make export'
    assert (copy/'cmvc_nb/__init__.py').read_bytes() == (ROOT/'cmvc_nb/__init__.py').read_bytes(), 'version in settings.ini and __init__ differ'


def test_no_module_without_a_notebook():
    exports = [m for n in NOTEBOOKS for c in code_cells(n) for m in re.findall(r'^#\|\s*default_exp\s+(\S+)', source(c), re.M)]
    assert len(exports) == len(set(exports)), 'two notebooks export the same module'
    assert sorted(f"cmvc_nb/{m.replace('.', '/')}.py" for m in exports) == PLAIN


def test_notebooks_clean(copy):
    "nbdev_clean finds nothing to strip: no execution counts, no stray metadata."
    python('from nbdev.clean import nbdev_clean; nbdev_clean()', copy)
    dirty = [n for n in NOTEBOOKS if (copy/n).read_bytes() != (ROOT/n).read_bytes()]
    for n in dirty: shutil.copy2(ROOT/n, copy/n)
    assert not dirty, f'{dirty}: run make export'


@pytest.mark.parametrize('n', NOTEBOOKS, ids=stem)
def test_notebook_is_a_chapter(n):
    "Title and one-line summary first; no error in the saved outputs; small enough for git and for the site."
    first = cells(n)[0]
    assert first['cell_type'] == 'markdown' and re.fullmatch(r'# \S.*\n+> \S.*\s*', source(first)), \
        'the first cell is "# Title" and "> one line", and nothing more: nbdev drops the rest of it from the page'
    outputs = [o for c in code_cells(n) for o in c['outputs']]
    assert not [o for o in outputs if o['output_type'] == 'error'], 'a saved output is a traceback'
    assert (ROOT/n).stat().st_size <= 300_000
    pictures = [''.join(v) for o in outputs for k, v in o.get('data', {}).items() if k.startswith('image/') and 'svg' not in k]
    assert all(len(base64.b64decode(p)) <= 100_000 for p in pictures)


@pytest.mark.parametrize('n', NOTEBOOKS, ids=stem)
def test_cells_suit_nbdev(n):
    "Staging runs every cell that imports, whatever its flags: so imports keep to cells of their own, and flagged cells have none."
    flags = set(CFG['tst_flags'].split())
    assert sum(any(isinstance(s, (ast.Import, ast.ImportFrom)) for s in parsed(c).body) for c in exported(n)) <= 1, \
        'one exported import cell, the first after default_exp'
    for c in code_cells(n):
        if not list(imports(parsed(c))): continue
        assert not directives(c) & flags, f'a flagged cell imports:\n{source(c)}'
        other = [s for s in ast.walk(parsed(c)) if isinstance(s, (ast.Expr, ast.Assign))]
        assert directives(c) & {'export', 'exports', 'exporti', 'hide'} or not other, f'imports and other code in one cell:\n{source(c)}'


@pytest.mark.parametrize('n', PLAIN, ids=stem)
def test_module_is_short(n): assert len((ROOT/n).read_text(encoding='utf-8').splitlines()) <= 400


@pytest.mark.parametrize('n', PLAIN, ids=stem)
def test_public_symbols_documented(n):
    "A docstring for each function, class and public method in `__all__`; a comment for each constant."
    text = (ROOT/n).read_text(encoding='utf-8')
    tree, lines, bare = ast.parse(text), text.splitlines(), []
    defs = {s.name: s for s in tree.body if isinstance(s, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    consts = {t.id: s for s in tree.body if isinstance(s, (ast.Assign, ast.AnnAssign))
              for o in (s.targets if isinstance(s, ast.Assign) else [s.target]) for t in ast.walk(o)
              if isinstance(t, ast.Name) and isinstance(t.ctx, ast.Store)}
    names = ast.literal_eval(consts['__all__'].value)
    assert names == list(dict.fromkeys(names)), 'a name is exported twice'
    for name in names:
        if name in consts:
            first, end = consts[name].lineno - 1, consts[name].end_lineno
            while lines[first-1].strip() and not lines[first-1].startswith('# %%'): first -= 1
            near = lines[first:end]  # the statement, and what stands above it without a blank line between
            if not any(re.search(r'(^|\s)# \S', l) for l in near): bare.append(name)
        elif name in defs:
            d = defs[name]
            if not ast.get_docstring(d): bare.append(name)
            if isinstance(d, ast.ClassDef):
                bare += [f'{name}.{m.name}' for m in d.body if isinstance(m, (ast.FunctionDef, ast.AsyncFunctionDef))
                         and not m.name.startswith('_') and not ast.get_docstring(m)]
        else: bare.append(f'{name} (in __all__, not defined)')
    assert not bare, f'{n}: no docstring, or no comment on a constant: {bare}'


# ---- import cost

LIGHT = 'errors video keyframes describers entropy bitstream rate representation selection words parts anchors datasets bdrate bench ray_bench cli'.split()


def test_package_imports_nothing_heavy():
    out = python("import sys, cmvc_nb; print({m.split('.')[0] for m in sys.modules} & {'torch','numpy','av','cv2','PIL','diffusers','transformers'})", ROOT)
    assert out.strip() == 'set()'


@pytest.mark.parametrize('name', [Path(n).stem for n in PLAIN if Path(n).stem in LIGHT])
def test_module_imports_without_torch(name):
    out = python(f"import sys, cmvc_nb.{name}; print({{m.split('.')[0] for m in sys.modules}} & {{'torch','diffusers','transformers','ray','fastcore','nbdev'}})", ROOT)
    assert out.strip().splitlines()[-1] == 'set()'


# ---- packaging

@pytest.fixture(scope='session')
def wheel(copy):
    "The wheel, built without a network from the tracked files."
    python("import setuptools.build_meta as b, os; os.makedirs('dist', exist_ok=True); b.build_wheel('dist')", copy)
    return next((copy/'dist').glob('*.whl'))


@pytest.fixture(scope='session')
def meta(wheel):
    "The METADATA of the wheel."
    with zipfile.ZipFile(wheel) as z: return Parser().parsestr(z.read(next(n for n in z.namelist() if n.endswith('/METADATA'))).decode())


def dist(req): return re.match(r'[\w.-]+', req).group(0).lower().replace('_', '-')


def test_wheel_holds_modules_and_models(wheel):
    data = [n for n in FILES if re.match(r'cmvc_nb/(presets|data)/', n)]
    with zipfile.ZipFile(wheel) as z: names = {n for n in z.namelist() if '.dist-info/' not in n}
    assert names - {'cmvc_nb/_modidx.py'} == set(MODULES) | set(data)
    weights = sum((ROOT/n).stat().st_size for n in data if n.endswith('.safetensors'))
    assert weights <= 32 * MiB, f'{weights/MiB:.1f} MiB of weights, 32 allowed'


def test_wheel_metadata(meta, wheel):
    import cmvc_nb
    assert (meta['Name'], meta['Version']) == ('cmvc_nb', cmvc_nb.__version__) and cmvc_nb.__version__ == CFG['version']
    assert meta['Requires-Python'] == '>=3.11' and 'Apache-2.0' in (meta['License-Expression'] or meta['License'])
    assert meta.get_payload().strip() == (ROOT/'README.md').read_text(encoding='utf-8').strip()
    assert {'demo', 'notebooks', 'describers', 'pipelines', 'metrics', 'dev'} <= set(meta.get_all('Provides-Extra'))
    with zipfile.ZipFile(wheel) as z: entry = z.read(next(n for n in z.namelist() if n.endswith('/entry_points.txt'))).decode()
    assert re.search(r'^cmvc = cmvc_nb\.cli:main$', entry, re.M)
    assert f"version: {CFG['version']}" in (ROOT/'CITATION.cff').read_text() and CFG['version'] in (ROOT/'CHANGELOG.md').read_text()


def test_requirements(meta):
    "nbdev and its kin never at run time; `dev` holds every extra; what a module imports at its top is required."
    reqs = meta.get_all('Requires-Dist')
    run = {dist(r) for r in reqs if 'extra ==' not in r}
    extra = lambda e: {dist(r) for r in reqs if re.search(f'''extra == ['"]{e}['"]''', r)}
    assert not run & {'fastcore', 'nbdev', 'execnb', 'pytest', 'jupyter'}
    assert extra('demo') | extra('notebooks') | extra('describers') | extra('pipelines') | extra('metrics') <= extra('dev')
    known, homes = run | extra('dev'), md.packages_distributions()
    own = lambda m: m in sys.stdlib_module_names or m == 'cmvc_nb'
    where = lambda m: {d.lower().replace('_', '-') for d in homes.get(m, [m])}
    for n in PLAIN:
        tree = ast.parse((ROOT/n).read_text(encoding='utf-8'))
        top = ast.Module([s for s in tree.body if isinstance(s, (ast.Import, ast.ImportFrom))], [])
        assert not [m for m in imports(top) if not own(m) and not where(m) & run], f'{n} imports at its top what is not a requirement'
        assert not [m for m in imports(tree) if not own(m) and not where(m) & known], f'{n} imports what no extra installs'


# ---- site and README

def test_quarto_yml_is_the_root_one():
    assert (ROOT/'nbs/_quarto.yml').read_bytes() == (ROOT/'_quarto.yml').read_bytes()
    assert (ROOT/'nbs/_quarto.yml').is_symlink() and os.readlink(ROOT/'nbs/_quarto.yml') == '../_quarto.yml'


def test_nbdev_yml_in_step(copy):
    "nbdev writes nbs/nbdev.yml from settings.ini; the tracked one is that."
    python('from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()', copy)
    assert (copy/'nbs/nbdev.yml').read_text() == (ROOT/'nbs/nbdev.yml').read_text()


def test_every_notebook_in_the_sidebar():
    def leaves(items):
        for i in items: yield from [i] if isinstance(i, str) else leaves(i.get('contents', []))
    listed = list(leaves(yaml.safe_load((ROOT/'nbs/sidebar.yml').read_text())['website']['sidebar']['contents']))
    names = [Path(n).name for n in NOTEBOOKS]
    assert sorted(listed) == sorted(names), f'missing from nbs/sidebar.yml: {set(names)-set(listed)}; not in git: {set(listed)-set(names)}'


def test_page_names_differ():
    "A page is named after its notebook without the digits: 10_x and 90_x would be one page."
    pages = [re.sub(r'^\d+[a-zA-Z0-9]*_', '', Path(n).name.lower()) for n in NOTEBOOKS]
    assert len(pages) == len(set(pages)), sorted(pages)


def test_site_stages_without_a_warning(copy):
    out = python('from nbdev.serve import proc_nbs\nproc_nbs(n_workers=2, force=True)', copy)
    noise = [l for l in out.splitlines() if re.search(r'warn|error|traceback|exception', l, re.I)]
    assert not noise, out
    assert {Path(n).name for n in NOTEBOOKS} <= {p.name for p in (copy/'_proc').iterdir()}
    assert not (copy/'_proc/_quarto.yml').is_symlink() and (copy/'_proc/_quarto.yml').read_bytes() == (ROOT/'_quarto.yml').read_bytes()


def test_readme_in_step():
    assert (ROOT/'README.md').read_text(encoding='utf-8') == readme(), 'run make readme'


def test_readme_links_lead_somewhere():
    text = re.sub(r'```.*?```', '', (ROOT/'README.md').read_text(encoding='utf-8'), flags=re.S)
    targets = re.findall(r'(?:\]\(|src="|href=")([^)"\s#]+)', text)
    assert not [t for t in targets if not re.match(r'[a-z]+:', t) and not (ROOT/t).exists()]


def test_readme_rejects_a_saved_picture(tmp_path):
    "A picture inside the notebook has no place in README.md: it is to be a file."
    nb = dict(cells=[dict(cell_type='code', source=['plot()'], outputs=[dict(output_type='display_data', data={'image/png': 'AA=='})])])
    (tmp_path/'index.ipynb').write_text(json.dumps(nb))
    with pytest.raises(ValueError, match='nbs/images'): readme(tmp_path/'index.ipynb')


def test_readme_links_and_directives(tmp_path):
    "Links move to the top folder, code in fences does not; hidden cells go, text outputs stay."
    md_cell = dict(cell_type='markdown', source=['![x](images/a.png) [l](../LICENSE) [w](https://a.b/c) `[k](v)` <img src="images/b.gif">'])
    hidden = dict(cell_type='code', source=['#| hide\n', 'secret'], outputs=[])
    shown = dict(cell_type='code', source=['#| echo: false\n', 'print(1)'], outputs=[dict(output_type='stream', name='stdout', text=['1\n'])])
    (tmp_path/'index.ipynb').write_text(json.dumps(dict(cells=[md_cell, hidden, shown])))
    body = readme(tmp_path/'index.ipynb').split('-->')[1].strip()
    assert body == '![x](nbs/images/a.png) [l](LICENSE) [w](https://a.b/c) `[k](v)` <img src="nbs/images/b.gif">\n\n```\n1\n```'


# ---- the files as such

def test_no_large_file():
    assert not [n for n in FILES if (ROOT/n).stat().st_size > 15 * MiB]


BINARY = {'.npy', '.cmvc', '.safetensors', '.png', '.jpg', '.webp'}

def test_no_trace_of_a_machine():
    "No absolute path of a private folder, no private package index, in any text file."
    bad = re.compile(r'(?<![\w.~-])/(?:work|root|home/\w+)/' + r'|extra-index' + r'-url|find' + r'-links|files\.python' + r'hosted')
    found = []
    for n in FILES:
        data = (ROOT/n).read_bytes()
        if b'\0' in data[:8192] or Path(n).suffix in BINARY or n == 'tests/test_repo.py': continue
        text = data.decode('utf-8')  # text files are UTF-8
        found += [f'{n}:{i}: {m.group(0)}' for i, l in enumerate(text.splitlines(), 1) for m in bad.finditer(l)]
    assert not found, found


def test_weights_are_safetensors_only():
    "No format that can run code when it is loaded."
    assert not [n for n in FILES if Path(n).suffix in {'.pt', '.pth', '.bin', '.pkl', '.pickle', '.ckpt', '.joblib'}]
    loads = [(n, l) for n in FILES if n.startswith('cmvc_nb/') and n.endswith('.py') for l in (ROOT/n).read_text().splitlines() if 'np.load(' in l]
    assert all('allow_pickle=False' in l for _, l in loads), loads # tables of integers may be .npy, never with objects


def test_ci_and_make_are_wired():
    assert os.access(ROOT/'.ci/run', os.X_OK) and 'make test' in (ROOT/'.ci/run').read_text()
    for target in ('demo', 'test'):
        plan = subprocess.run(['make', '-n', '-B', target, 'CLIP=my clip.mp4'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert '-m venv' in plan and f"pip install" in plan
        assert target != 'demo' or "cmvc demo 'my clip.mp4' -o demo/" in plan
        assert target != 'test' or ('nbdev_test' in plan and '-m pytest' in plan)
