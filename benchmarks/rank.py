"""One rank of one contestant: `python -m benchmarks.rank FOLDER`, started by `launching.py`."""

import json
import os
import sys
from pathlib import Path

from benchmarks.measuring import measure
from benchmarks.workload import Workload


def main() -> None:
    """Read the request, measure, and let rank 0 write the answer."""
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text())
    workload = Workload(**request.pop("workload"))
    try:
        result = measure(workload=workload, **request)
    except Exception as error:
        (folder / f"failure{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")
        raise
    if os.environ["RANK"] == "0":
        (folder / "answer.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
