"""`diffpress search`: the recipe that loses least within limits, found by trying many on this machine or a cluster."""
