package store

import (
	bolt "go.etcd.io/bbolt"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// Lookup returns what a start would find of one mapping, and whether it would
// find it.
func (s *Store) Lookup(k pcp.Key) (r pcpserver.Record, found bool, err error) {
	key := appendKey(nil, k)
	s.mu.Lock()
	value, pending := s.gathered(key)
	s.mu.Unlock()
	if pending {
		if value == nil {
			return r, false, nil
		}
		r, err = decode(key, value)
		return r, err == nil, err
	}
	s.file.RLock()
	defer s.file.RUnlock()
	if s.db == nil {
		return r, false, nil
	}
	err = s.db.View(func(tx *bolt.Tx) error {
		value := tx.Bucket(bucketMappings).Get(key)
		if found = value != nil; !found {
			return nil
		}
		var err error
		r, err = decode(key, value)
		return err
	})
	return r, found && err == nil, err
}
