"""Starting and stopping models: transient systemd units, or plain processes."""
