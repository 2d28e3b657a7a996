import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
version: dict[str, str] = {}
exec((ROOT / 'dyrep_mm/version.py').read_text(), version)


class BuildWithMim(build_py):
    """Puts configs, tools and their index into the wheel, where OpenMMLab's packages have them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # they are beside the package
            return
        mim = Path(self.build_lib) / 'dyrep_mm' / '.mim'
        shutil.rmtree(mim, ignore_errors=True)  # of an earlier build
        for name in ('configs', 'tools'):
            shutil.copytree(
                ROOT / name, mim / name, ignore=shutil.ignore_patterns('__pycache__', '*.pyc')
            )
        shutil.copy(ROOT / 'model-index.yml', mim)


setup(
    name='dyrep_mm',
    version=version['__version__'],
    description='DyRep for OpenMMLab: dynamic re-parameterization while a model trains',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['dyrep_mm', 'dyrep_mm.*']),
    package_data={'dyrep_mm': ['py.typed'], 'dyrep_mm.report': ['*.j2']},
    cmdclass={'build_py': BuildWithMim},
    entry_points={
        'console_scripts': [
            'dyrep-flops = dyrep_mm.cli.flops:main',
            'dyrep-fuse = dyrep_mm.cli.fuse:main',
            'dyrep-report = dyrep_mm.cli.report:main',
        ]
    },
    # The OpenMMLab packages come under two names each (the original and the maintained line):
    # which of them is installed is the user's choice, see requirements.txt.
    install_requires=['torch>=2.0'],
    # For `dyrep-report`, and for `dyrep-fuse --onnx`.
    extras_require={'report': ['matplotlib', 'jinja2'], 'onnx': ['onnx', 'onnxruntime']},
)
