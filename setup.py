from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
version: dict[str, str] = {}
exec((ROOT / 'dyrep_mm/version.py').read_text(), version)

setup(
    name='dyrep_mm',
    version=version['__version__'],
    description='DyRep for OpenMMLab: dynamic re-parameterization while a model trains',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['dyrep_mm', 'dyrep_mm.*']),
    package_data={'dyrep_mm.report': ['*.j2']},
    # The OpenMMLab packages come under two names each (the original and the maintained line):
    # which of them is installed is the user's choice, see requirements.txt.
    install_requires=['torch>=2.0'],
    # For `tools/report.py`, and for `tools/fuse.py --onnx`.
    extras_require={'report': ['matplotlib', 'jinja2'], 'onnx': ['onnx', 'onnxruntime']},
)
