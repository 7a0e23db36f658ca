"""The setuptools command that turns csrc/ into fused_elbo/_C.abi3.so.

The object registers torch operators when it is loaded and needs nothing of Python, neither its
headers to build nor its ABI to run.

torch.utils.cpp_extension is not used: its CUDAExtension refuses a CPU-only torch, and it imports
torch.

- csrc/cpu/kernels_*.cpp: once per ISA level, the level's name in the macro FUSED_ELBO_ISA.
- csrc/cpu/*.cpp otherwise, and csrc/*.cpp: once, for the oldest processor. Only the latter see
  torch's headers.
- csrc/cuda/*.cu: by nvcc, if there is one, and then csrc/cuda/*.cpp by the C++ compiler. The
  finished object loads on a torch without CUDA too.
- csrc/fastpath/module.cpp: into a Python module of its own, _fastpath, against the torch and the
  Python at hand. Without it everything works, small calls more slowly.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

from build_support.compile import Job, JobFailed, compile_all
from build_support.nvcc import Nvcc, NvccError, arch_flags, choose_archs, find_nvcc
from build_support.torch_paths import TARGET_MACRO, TARGET_TEXT, find_torch

ROOT = Path(__file__).resolve().parent.parent
BUILD_INFO = "_build_info.json"
FASTPATH = f"_fastpath{sysconfig.get_config_var('EXT_SUFFIX')}"
EXPORTS = ROOT / "build_support" / "exports.map"

# From the oldest up. The linker keeps the first copy of an inline function that several objects
# define, and only the copy of the oldest level runs everywhere.
ISA_LEVELS = {
    "x86_64": {
        # What hardly any machine runs may be smaller and slower: a wheel has room for 5 MB.
        "v2": ["-march=x86-64-v2", "-mprefer-vector-width=512", "-O2"],
        "v3": ["-march=x86-64-v3", "-mprefer-vector-width=512"],
        "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    },
    "aarch64": {"generic": ["-march=armv8-a"]},
}
COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Not -ffast-math: it drops NaN handling, and at link time turns on flush-to-zero process-wide.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


@dataclass(frozen=True)
class CudaPlan:
    """What nvcc is going to compile, or why it is not."""

    nvcc: Nvcc | None = None
    archs: Sequence[str] = ()
    note: str | None = None
    jobs: Sequence[Job] = field(default=())


@dataclass(frozen=True)
class FastpathPlan:
    """The compiled object of _fastpath, or why there is none."""

    job: Job | None = None
    note: str | None = None


class BuildExtension(build_ext):
    """Compiles what changed, links one abi3 shared object and records beside it what is inside."""

    def build_extension(self, ext: object) -> None:
        if platform.system() != "Linux" or platform.machine() not in ISA_LEVELS:
            raise PlatformError(
                "fused-elbo: builds on Linux on x86-64 and aarch64,"
                f" not on {platform.system()} {platform.machine()}"
            )
        self.torch = find_torch()
        self.cxx = find_cxx()
        self.objects = ROOT / "build" / "objects"

        cuda = self.plan_cuda(os.environ.get("FUSED_ELBO_CUDA", ""))
        host = self.host_jobs(with_cuda=bool(cuda.jobs))
        with ThreadPoolExecutor(1) as aside:  # one long job, which may fail
            fastpath = aside.submit(self.plan_fastpath, os.environ.get("FUSED_ELBO_FASTPATH", ""))
            compile_all([*cuda.jobs, *host])
        extension = Path(self.get_ext_fullpath("fused_elbo._C"))
        extension.parent.mkdir(parents=True, exist_ok=True)
        self.link(extension, host, cuda)
        self.link_fastpath(extension.with_name(FASTPATH), fastpath.result())
        self.write_build_info(extension.with_name(BUILD_INFO), cuda, fastpath.result().note)

    def plan_cuda(self, mode: str) -> CudaPlan:
        """Without a working nvcc the build is CPU-only, unless mode is "1".

        With one, a kernel that does not compile is an error in every mode but "0": an installation
        must not succeed without its kernels because of a mistake in them.
        """
        if mode not in ("", "0", "1"):
            raise PlatformError(f"fused-elbo: FUSED_ELBO_CUDA must be 0 or 1, got {mode!r}")
        if mode == "0":
            return CudaPlan(note="FUSED_ELBO_CUDA=0 when this was built")
        try:
            nvcc = find_nvcc()
            nvcc.library_dir()
            archs = choose_archs(os.environ.get("FUSED_ELBO_CUDA_ARCHS"), nvcc.supported_archs())
            self.probe(nvcc)
        except NvccError as error:
            if mode == "1":
                raise PlatformError(f"fused-elbo: FUSED_ELBO_CUDA=1, but {error}") from error
            print(
                f"fused-elbo: no CUDA kernels: {error}. FUSED_ELBO_CUDA=1 makes this an error.",
                flush=True,
            )
            return CudaPlan(note=str(error))
        compiler = self.nvcc_command(nvcc, arch_flags(archs))
        jobs = [
            Job(source, self.objects / f"cuda.{source.stem}.o", compiler, nvcc.version_text)
            for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))
        ]
        return CudaPlan(nvcc, archs, None, jobs)

    def probe(self, nvcc: Nvcc) -> None:
        """Compiles an empty kernel, which fails if nvcc does not accept the host compiler.

        Raises:
            NvccError: with the first error that nvcc reports.
        """
        source = self.objects / "probe.cu"
        if not source.exists():
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_text("__global__ void probe() {}\n")
        compiler = self.nvcc_command(nvcc, [])
        try:
            compile_all([Job(source, self.objects / "cuda.probe.o", compiler, nvcc.version_text)])
        except JobFailed as failure:
            lines = failure.output.strip().splitlines() or ["no output"]
            first = next((line for line in lines if "error" in line), lines[-1])
            raise NvccError(f"{nvcc.path} does not compile: {first.strip()}") from failure

    def nvcc_command(self, nvcc: Nvcc, architectures: Sequence[str]) -> list[str]:
        return [
            str(nvcc.path),
            *(["-ccbin", self.cxx[0]] if "CXX" in os.environ else []),
            *["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"],
            # For Nsight Compute's source page. It makes the object two and a half times as large.
            *(["-lineinfo"] if os.environ.get("FUSED_ELBO_LINEINFO") == "1" else []),
            *nvcc.compression_flags(),
            *architectures,
            f"-I{ROOT / 'csrc'}",
        ]

    def host_jobs(self, with_cuda: bool) -> list[Job]:
        csrc = ROOT / "csrc"
        levels = ISA_LEVELS[platform.machine()]
        baseline = next(iter(levels.values()))
        version = version_line(self.cxx)
        common = [*self.cxx, *COMMON_FLAGS, f"-I{csrc}"]
        common += shlex.split(os.environ.get("CXXFLAGS", ""))

        def job(name: str, source: Path, flags: Sequence[str], toolchain: str = version) -> Job:
            return Job(source, self.objects / f"{name}.o", [*common, *flags], toolchain)

        torch = [
            *baseline,
            f"-DTORCH_TARGET_VERSION={TARGET_MACRO}",
            *(["-DFUSED_ELBO_WITH_CUDA"] if with_cuda else []),
            *["-isystem", str(self.torch.include)],
        ]
        tag = "cuda" if with_cuda else "cpu-only"
        jobs = [
            job(f"torch.{source.stem}.{tag}", source, torch, f"{version}, {self.torch.version}")
            for source in sorted(csrc.glob("*.cpp"))
        ]
        if with_cuda:  # the host side of the CUDA kernels needs nothing of CUDA
            jobs += [
                job(f"cuda-host.{source.stem}", source, baseline)
                for source in sorted(csrc.glob("cuda/*.cpp"))
            ]
        kernels = sorted(csrc.glob("cpu/kernels_*.cpp"))
        jobs += [
            job(f"cpu.{source.stem}", source, [*baseline, *KERNEL_FLAGS])
            for source in sorted({*csrc.glob("cpu/*.cpp")} - {*kernels})
        ]
        for level, flags in levels.items():
            jobs += [
                job(
                    f"cpu.{source.stem}.{level}",
                    source,
                    [*flags, *KERNEL_FLAGS, f"-DFUSED_ELBO_ISA={level}"],
                )
                for source in kernels
            ]
        return jobs

    def link(self, extension: Path, host: Sequence[Job], cuda: CudaPlan) -> None:
        arguments = [
            *[str(job.object) for job in [*host, *cuda.jobs]],
            f"-L{self.torch.lib}",
            # Without libtorch itself among the needed libraries, the weak reference to the function
            # that tells torch's current CUDA stream stays null on a torch that has it.
            *["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu"],
            # A kernel that is declared but not defined is an error of the build, not of loading.
            *["-Wl,-z,defs", "-Wl,-O1", f"-Wl,--version-script={EXPORTS}"],
        ]
        if cuda.nvcc:
            arguments += [
                f"-L{cuda.nvcc.library_dir()}",
                "-lcudart_static",
                "-ldl",
                "-lrt",
                "-lpthread",
            ]
        self.run_linker(extension, arguments)

    def run_linker(self, output: Path, arguments: Sequence[str]) -> None:
        """Makes a shared object, in the place of an older one only when it is whole."""
        partial = output.with_suffix(f".{os.getpid()}.tmp")
        flags = shlex.split(os.environ.get("LDFLAGS", ""))
        command = [*self.cxx, "-shared", "-Wl,-s", "-o", str(partial), *arguments, *flags]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise LinkError(f"linking {output.name} failed:\n{shlex.join(command)}\n{done.stdout}")
        partial.replace(output)

    def plan_fastpath(self, mode: str) -> FastpathPlan:
        """Compiles _fastpath; or says why not, unless mode is "1"."""
        if mode not in ("", "0", "1"):
            raise PlatformError(f"fused-elbo: FUSED_ELBO_FASTPATH must be 0 or 1, got {mode!r}")
        if mode == "0":
            return FastpathPlan(note="FUSED_ELBO_FASTPATH=0 when this was built")
        python = Path(sysconfig.get_path("include"))
        if not (python / "Python.h").is_file():
            note = f"{python}/Python.h is missing (Debian and Ubuntu: apt-get install python3-dev)"
        else:
            job = self.fastpath_job(python)
            try:
                compile_all([job])
                return FastpathPlan(job)
            except JobFailed as failure:  # torch's C++ classes change from release to release
                if mode == "1":
                    raise
                print(failure, flush=True)
                note = f"it does not compile against torch {self.torch.version}"
        if mode == "1":
            raise PlatformError(f"fused-elbo: FUSED_ELBO_FASTPATH=1, but {note}")
        print(
            f"fused-elbo: no fast path: {note}. FUSED_ELBO_FASTPATH=1 makes this an error.",
            flush=True,
        )
        return FastpathPlan(note=note)

    def fastpath_job(self, python: Path) -> Job:
        baseline = next(iter(ISA_LEVELS[platform.machine()].values()))
        torch = self.torch.include
        compiler = [
            *[*self.cxx, "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"],
            *baseline,
            *["-isystem", str(torch), "-isystem", str(torch / "torch/csrc/api/include")],
            *["-isystem", str(python)],
            *shlex.split(os.environ.get("CXXFLAGS", "")),
        ]
        toolchain = f"{version_line(self.cxx)}, torch {self.torch.version} {self.torch.git_version}"
        object = self.objects / f"fastpath.{sys.implementation.cache_tag}.o"
        return Job(ROOT / "csrc/fastpath/module.cpp", object, compiler, toolchain)

    def link_fastpath(self, module: Path, plan: FastpathPlan) -> None:
        module.unlink(missing_ok=True)
        if plan.job is None:
            return
        arguments = [
            str(plan.job.object),
            f"-L{self.torch.lib}",
            *["-ltorch_python", "-ltorch_cpu", "-lc10", "-Wl,-O1"],
            # The extension beside it, which is loaded by then.
            *[f"-L{module.parent}", "-l:_C.abi3.so", "-Wl,-rpath,$ORIGIN"],
        ]
        self.run_linker(module, arguments)

    def write_build_info(self, file: Path, cuda: CudaPlan, fastpath_note: str | None) -> None:
        info = {
            "version": self.distribution.get_version(),
            "machine": platform.machine(),
            "compiler": version_line(self.cxx),
            "isa_levels": list(ISA_LEVELS[platform.machine()]),
            "torch": self.torch.version,
            "torch_target": TARGET_TEXT,
            "nvcc": cuda.nvcc.version_text if cuda.nvcc else None,
            "cuda_archs": list(cuda.archs),
            "cuda_note": cuda.note,
            "fastpath": f"{self.torch.version} {self.torch.git_version}"
            if fastpath_note is None
            else None,
            "fastpath_note": fastpath_note,
        }
        file.write_text(json.dumps(info, indent=2) + "\n")

    # setuptools knows of the extension alone; what lies beside it goes wherever it goes.

    def _beside(self, extension: str) -> dict[str, str]:
        """What a build puts beside the extension: names and paths, whether or not they exist."""
        return {name: str(Path(extension).with_name(name)) for name in (BUILD_INFO, FASTPATH)}

    def get_outputs(self) -> list[str]:
        outputs: list[str] = super().get_outputs()
        beside = [path for output in outputs for path in self._beside(output).values()]
        return [*outputs, *filter(os.path.exists, beside)]

    def get_output_mapping(self) -> dict[str, str]:
        mapping: dict[str, str] = super().get_output_mapping()
        return mapping | {
            built_beside: self._beside(source)[name]
            for built, source in mapping.items()
            for name, built_beside in self._beside(built).items()
            if os.path.exists(built_beside)
        }

    def copy_extensions_to_source(self) -> None:
        """Replaces each file at once: a process that loads it meanwhile sees the old or the new."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            inplace, built = self._get_inplace_equivalent(build_py, ext)
            targets, origins = self._beside(inplace), self._beside(built)
            for target, origin in ((inplace, built), *zip(targets.values(), origins.values())):
                if not os.path.exists(origin):
                    Path(target).unlink(missing_ok=True)
                    continue
                partial = f"{target}.{os.getpid()}.tmp"
                shutil.copy2(origin, partial)
                os.replace(partial, target)


def find_cxx() -> list[str]:
    if requested := os.environ.get("CXX"):
        return shlex.split(requested)
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise CompileError("fused-elbo: no C++ compiler found: apt-get install g++, or set CXX")


def version_line(compiler: Sequence[str]) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(
            f"fused-elbo: the C++ compiler {shlex.join(compiler)} does not run: {error}"
        ) from error
    return done.stdout.splitlines()[0]
