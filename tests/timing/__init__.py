"""ssprop_patch.timing: what is measured is what it says. How long it takes is never asserted."""
