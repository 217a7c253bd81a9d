"Everything that pip needs to know is in settings.ini; here it is only handed on."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
ini = ConfigParser(delimiters='=')
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

# `xyz_requirements` becomes the extra `xyz`; `dev` holds all the others too
extras = {k.removesuffix('_requirements'): cfg[k].split() for k in cfg if k.endswith('_requirements')}
extras['dev'] = sorted({req for reqs in extras.values() for req in reqs})
lib = cfg['lib_name']

setup(
    name=lib, version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers',
                 'Programming Language :: Python :: 3', 'Topic :: Multimedia :: Video :: Conversion'],
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(), extras_require=extras,
    packages=find_packages(include=[lib, f'{lib}.*']), package_data={lib: cfg['package_data'].split()},
    include_package_data=False, zip_safe=False,
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f'{lib} = {lib}._modidx:d']},  # where nbdev finds our symbols when it links the docs
)
