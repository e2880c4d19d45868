"""Offloading policies, the interface they are written against, and the parts they share."""
