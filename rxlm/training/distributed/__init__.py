"""One run in several processes: who they are (:mod:`.world`), how they share an update
(:mod:`.strategy`), and DeepSpeed's way of doing so (:mod:`.zero`)."""
