"""What layouts share that hold a table of classes and no names for them."""


def numbered(net: dict) -> dict:
    """The conditioner of a network whose classes go by number, as in `--prompt 207`; without a null row, unguided."""
    if not net.get("num_classes"):
        return {}
    conditioner = {"kind": "label", "classes": [str(i) for i in range(net["num_classes"])]}
    return {"conditioner": conditioner} | ({} if net.get("null_class", True) else {"guidance": 1.0})
