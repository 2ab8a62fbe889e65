"""Known vulnerabilities among the locked packages, in one line; says so where no vulnerability service is reached."""

import json
import subprocess
import sys

LOCK = "requirements/all.txt"

done = subprocess.run(
    ["pip-audit", "--requirement", LOCK, "--require-hashes", "--disable-pip", "--format", "json"],
    capture_output=True,
    text=True,
    check=False,
)
try:
    packages = json.loads(done.stdout)["dependencies"]
except ValueError:
    *_, reason = done.stderr.strip().splitlines() or ["it said nothing"]
    if "ConnectionError" not in done.stderr and "onnection" not in reason:
        sys.exit(f"audit: pip-audit gave no report: {reason}")
    print(f"audit: NOT audited, no vulnerability service is reached: {reason}")
    sys.exit()
vulnerable = {p["name"]: [v["id"] for v in p["vulns"]] for p in packages if p.get("vulns")}
skipped = sum("skip_reason" in p for p in packages)
print(f"audit: {len(packages) - skipped} packages audited, {len(vulnerable)} vulnerable", end="")
print(f"; {skipped} NOT audited: the package index here serves no vulnerability reports" if skipped else "")
for name, identifiers in vulnerable.items():
    print(f"  {name}: {', '.join(identifiers)}")
sys.exit(bool(vulnerable))
