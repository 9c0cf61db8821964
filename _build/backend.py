"""PEP 517 backend: setuptools, building against the torch of the environment that the package is installed into.

pip builds in an isolated environment, and a plain ``requires = ["torch"]`` would download a second torch into it, of
whatever version is newest. This backend looks at the host environment first and asks only for what is missing there.
"""

import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

NEEDED = {"setuptools": (77, 0), "torch": (2, 10)}


def host_path():
    """``sys.path`` as the user's interpreter has it: ``-I`` drops what pip's isolation puts in front."""
    code = "import sys; print('\\n'.join(sys.path))"
    shown = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    return [entry for entry in shown.splitlines() if entry]


PATH = [*sys.path, *(entry for entry in host_path() if entry not in sys.path)]


def missing(*names):
    """Requirements among ``names`` that neither the isolated nor the host environment satisfies."""
    return [f"{name}>={'.'.join(map(str, NEEDED[name]))}" for name in names if not installed(name)]


def installed(name):
    for distribution in metadata.distributions(name=name, path=PATH):  # the first one is what would be imported
        numbers = distribution.version.split("+")[0].split(".")[:2]
        return tuple(int(number) for number in numbers if number.isdigit()) >= NEEDED[name]
    return False


def setuptools_backend():
    sys.path[:] = PATH
    if lacking := missing("setuptools"):  # only where pip was told not to isolate, and so not to fetch it
        raise RuntimeError(f"mlip_kernels: the build needs {lacking[0]}; pip install --upgrade setuptools")
    import setuptools.build_meta

    return setuptools.build_meta


def get_requires_for_build_wheel(config_settings=None):
    from compilers import package_module

    nothing_to_compile = package_module("_variables").flag("MLIP_KERNELS_SKIP_EXT")
    return missing("setuptools") if nothing_to_compile else missing("setuptools", "torch")


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings=None):
    return missing("setuptools")


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    for leftover in Path("build").glob("lib*"):  # a module deleted since the last build would live on in the wheel
        shutil.rmtree(leftover)
    return setuptools_backend().build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return setuptools_backend().build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    return setuptools_backend().build_sdist(sdist_directory, config_settings)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    return setuptools_backend().prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    return setuptools_backend().prepare_metadata_for_build_editable(metadata_directory, config_settings)
