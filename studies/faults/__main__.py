"""Prints one table of all campaigns of faults that have results in ``docs/studies/faults``."""

from studies.faults.campaign import table
from studies.faults.kills import OUTPUT_DIR
from studies.results import read_results

if __name__ == "__main__":
    print(table({file.stem: read_results(file) for file in sorted(OUTPUT_DIR.glob("*.jsonl"))}))
