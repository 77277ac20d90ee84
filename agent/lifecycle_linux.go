package agent

import (
	"log/slog"
	"time"
)

// OpenEraser is for this box, which runs. Nothing is written before one of its methods
// is called.
func OpenEraser(log *slog.Logger) (*Eraser, error) {
	k, err := OpenKeeper(log)
	if err != nil {
		return nil, err
	}
	if k == nil {
		return nil, ErrNoVolumes
	}
	return &Eraser{
		Log: log, Name: k.Name, Version: k.Version, Volumes: k.Volumes, OpenTPM: k.OpenTPM, Now: time.Now, Lock: k.lock,
	}, nil
}
