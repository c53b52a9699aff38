"""Every row of the benchmark, by name; QUICK are tiny ones that show it work."""

from medssm.bench import attention, convolutions, int8, packed, scans

ROWS = {**scans.ROWS, **attention.ROWS, **convolutions.ROWS, **packed.ROWS, **int8.ROWS}
QUICK = {**scans.QUICK, **attention.QUICK, **packed.QUICK, **int8.QUICK}
