"""Every row of the benchmark, by name; QUICK are tiny ones that show it work."""

from medssm.bench import attention, scans

ROWS = {**scans.ROWS, **attention.ROWS}
QUICK = {**scans.QUICK, **attention.QUICK}
