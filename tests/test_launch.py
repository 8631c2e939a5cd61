"""The launch scripts: what they would do, word for word, and how SLURM's warning is handled."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def launch(script: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(LAUNCH / script), *args],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def lines(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return [line.strip() for line in result.stdout.splitlines()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_slurm_would_run_save_and_queue_again():
    found = launch("slurm.sbatch", "--workdir=/shared/a b", DRY_RUN="1", SLURM_JOB_ID="17")
    assert lines(found) == [
        r"srun --kill-on-bad-exit=1 .venv/bin/python -m gidd_jax.train --workdir=/shared/a\ b "
        "--distributed",
        "# five minutes before the time limit:",
        "scancel --signal=TERM 17.0",
        "scontrol requeue 17",
    ]


def test_tpu_vm_would_make_install_and_run():
    found = launch(
        "tpu_vm.sh",
        "keep",
        "--config=gidd:small",
        "--config.data.path=a b/*.txt",
        DRY_RUN="1",
        NAME="my tpu",
        ZONE="us-east5-b",
        TYPE="v6e-64",
        REPO="https://example.com/it's.git",
        BUCKET="runs",
    )
    create, install, mount, run, again = lines(found)
    assert create == (
        r"gcloud compute tpus tpu-vm create my\ tpu --zone=us-east5-b --accelerator-type=v6e-64 "
        "--version=tpu-ubuntu2204-base --spot"
    )
    # What the hosts' shells get, unquoted once.
    words = [
        subprocess.run(
            ["bash", "-c", f'set -- {line}; printf %s "${{@: -1}}"'],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.removeprefix("--command=")
        for line in (install, mount, run)
    ]
    assert r"git clone https://example.com/it\'s.git gidd_jax" in words[0]
    assert "-c constraints.txt -e '.[tpu]'" in words[0]
    assert "gcsfuse 'runs' /mnt/bucket" in words[1]
    assert r"--config=gidd:small --config.data.path=a\ b/\*.txt  --distributed" in words[2]
    for word in words:
        subprocess.run(["bash", "-n", "-c", word], check=True)
    assert again.startswith("# again from the top")


def test_gpu_node_would_install_once_and_train(tmp_path):
    clone = tmp_path / "my clone"
    (clone / "launch").mkdir(parents=True)
    shutil.copy(LAUNCH / "gpu_node.sh", clone / "launch")
    command = ["bash", str(clone / "launch" / "gpu_node.sh"), "--workdir=a b"]

    def run() -> list[str]:
        env = {"PATH": os.environ["PATH"], "DRY_RUN": "1"}
        return lines(subprocess.run(command, env=env, capture_output=True, text=True, check=False))

    train = r".venv/bin/python -m gidd_jax.train --workdir=a\ b"
    assert run() == [
        "python3 -m venv .venv",
        r".venv/bin/pip install -q -c constraints.txt -e .\[cuda\]",
        "touch .venv/.cuda",
        train,
    ]
    (clone / ".venv").mkdir()
    (clone / ".venv" / ".cuda").touch()
    assert run() == [train]


@pytest.mark.parametrize(
    ("script", "args", "words"),
    [
        ("slurm.sbatch", [], "give --workdir="),
        ("tpu_vm.sh", ["run"], "run needs the flags of gidd_jax.train"),
        ("tpu_vm.sh", ["keep"], "keep needs the flags of gidd_jax.train"),
        ("tpu_vm.sh", ["install"], "set REPO"),
        ("tpu_vm.sh", [], "launch/tpu_vm.sh create | install"),
        ("gpu_node.sh", [], "launch/gpu_node.sh --config="),
    ],
)
def test_misuse_is_exit_code_2(script, args, words):
    found = launch(script, *args, DRY_RUN="1")
    assert found.returncode == 2
    assert words in found.stderr
    assert found.stdout == ""


# A cluster of two commands: srun runs until scancel writes a file, then saves and ends well.
SRUN = "#!/bin/sh\necho srun >>log\nwhile [ ! -e term ]; do sleep 0.05; done\necho saved >>log\n"
SCANCEL = '#!/bin/sh\necho scancel "$@" >>log\ntouch term\n'
SCONTROL = '#!/bin/sh\necho scontrol "$@" >>log\n'


def slurm_job(folder: Path, srun: str) -> subprocess.Popen[bytes]:
    (folder / "bin").mkdir()
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name, text in (
        ("bin/srun", srun),
        ("bin/scancel", SCANCEL),
        ("bin/scontrol", SCONTROL),
        (".venv/bin/python", "#!/bin/sh\n"),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return subprocess.Popen(
        ["bash", str(LAUNCH / "slurm.sbatch"), "--workdir=run"],
        env={
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "17",
            "SLURM_SUBMIT_DIR": str(folder),
        },
    )


def test_slurm_saves_before_the_time_limit_and_queues_again(tmp_path):
    job = slurm_job(tmp_path, SRUN)
    while not (tmp_path / "log").exists():
        assert job.poll() is None
    job.send_signal(10)  # SIGUSR1, as --signal=B:USR1@300 sends it
    assert job.wait(timeout=60) == 0
    assert (tmp_path / "log").read_text().splitlines() == [
        "srun",
        "scancel --signal=TERM 17.0",
        "saved",
        "scontrol requeue 17",
    ]


@pytest.mark.parametrize("code", [0, 3])
def test_slurm_does_not_queue_again_what_ended_by_itself(tmp_path, code):
    job = slurm_job(tmp_path, f"#!/bin/sh\necho srun >>log\nexit {code}\n")
    assert job.wait(timeout=60) == code
    assert (tmp_path / "log").read_text() == "srun\n"
