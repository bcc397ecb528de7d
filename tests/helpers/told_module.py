"""What tests run as a fork: says who it is, and waits if it is told to."""

from __future__ import annotations

import os
import sys
import time

if __name__ == "__main__":
    said = [os.getpid(), os.getsid(0), *sys.argv[1:], os.environ["MARK"], sys.stdin.read() == ""]
    sys.stdout.write(" ".join(map(str, said)) + "\n")
    sys.stdout.flush()
    if "wait" in sys.argv:
        time.sleep(600)
    sys.exit(3 if "fail" in sys.argv else 0)
