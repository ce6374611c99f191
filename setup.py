"Everything about the distribution stands in settings.ini; this turns it into setuptools' fields."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta',
            '5 - Production/Stable', '6 - Mature', '7 - Inactive']
first_minor = int(cfg['min_python'].split('.')[1])
classifiers = [f"Development Status :: {statuses[int(cfg['status']) - 1]}",
               *(f'Intended Audience :: {o}' for o in cfg['audience'].split()),
               f"Natural Language :: {cfg['language']}",
               'Topic :: Scientific/Engineering :: Artificial Intelligence', 'Typing :: Typed',
               'Programming Language :: Python :: 3',
               *(f'Programming Language :: Python :: 3.{minor}' for minor in range(first_minor, 14))]

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0', classifiers=classifiers,
    url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl'],
                  'Changes': f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md"},
    packages=find_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"]),
    package_data={cfg['lib_path']: ['artifacts/*', 'py.typed', '*.pyi', '**/*.pyi']},
    include_package_data=True, zip_safe=False,
    python_requires='>=' + cfg['min_python'], install_requires=cfg['requirements'].split(),
    extras_require={k: cfg[f'{k}_requirements'].split()
                    for k in ('dev', 'notebook', 'smollm2', 'tiktoken', 'remote', 'probe')},
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
)
