"""The store that both planes share: its interface, etcd and memory, and the records in it."""
