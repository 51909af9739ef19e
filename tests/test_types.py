"""The hints of the package hold, as far as they go (`mypy.ini`)."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_hints_hold(tmp_path):
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_public_face_is_hinted():
    "Names that `import ff_research as ff` offers: parameters and result of each function have a hint."
    import inspect

    import ff_research as ff

    faces = [getattr(ff, name) for name in ff.__all__]
    bare = []
    for face in faces:
        if not inspect.isfunction(face):
            continue
        signature = inspect.signature(face)
        hints = [p.annotation for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        if signature.empty in [*hints, signature.return_annotation]:
            bare.append(face.__name__)
    assert bare == []
