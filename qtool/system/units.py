"""Durations and sizes as text."""


def duration(seconds: float) -> str:
    """Return a duration as ``4.2 s``, ``3:05`` or ``1:02:05``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def file_size(num_bytes: float) -> str:
    """Return a size as ``0.02 MB``, ``3.37 MB``, ``812 MB`` or ``16.1 GB``: two decimals, or three digits."""
    value, unit = (num_bytes / 1e9, "GB") if num_bytes >= 0.9995e9 else (num_bytes / 1e6, "MB")
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def size(num_bytes: float) -> str:
    """Return a size as ``812 MB`` or ``3.4 GB``, in powers of ten."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 0.9995e9 else f"{num_bytes / 1e6:.0f} MB"
