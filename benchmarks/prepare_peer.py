"""What nnU-Net v2 does for ``benchmarks/prepare.py``; runs under the peer's own Python, needs nothing of ours.

Usage: ``python prepare_peer.py PROCESSES`` with nnUNet_raw, nnUNet_preprocessed and nnUNet_results set. The last line
printed is a JSON object with the seconds of fingerprint and preprocessing; imports and planning are not counted.
"""

import json
import resource
import sys
import time


def main() -> None:
    """Fingerprint, plan and preprocess data set 1 at 1 mm."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api  # pyright: ignore[reportMissingImports]

    processes = int(sys.argv[1])
    start = time.perf_counter()
    api.extract_fingerprints([1], num_processes=processes, show_progress_bar=False, verbose=False)
    fingerprint_s = time.perf_counter() - start
    plans = api.plan_experiments([1], overwrite_target_spacing=(1.0, 1.0, 1.0))
    start = time.perf_counter()
    api.preprocess(
        [1],
        plans,
        configurations=("3d_fullres",),
        num_processes=(processes,),
        show_progress_bar=False,
    )
    preprocess_s = time.perf_counter() - start
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
    found = {
        "fingerprint_s": fingerprint_s,
        "preprocess_s": preprocess_s,
        "seconds": fingerprint_s + preprocess_s,
        "cpu_s": sum(u.ru_utime + u.ru_stime for u in usages),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
