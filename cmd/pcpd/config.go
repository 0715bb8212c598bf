package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/pflag"
)

// maxConfigFile is the greatest length in octets of a configuration file. All
// flags with many values each fit in a part of it.
const maxConfigFile = 64 << 10

// commandLineOnly are the flags that say what this one run is to do, and so
// may not stand in a configuration file.
var commandLineOnly = []string{"config", "check", "version"}

// readConfig sets those flags that were not typed to what the configuration
// file says. If the file has any problem, it sets none.
func (p *problems) readConfig(f *pflag.FlagSet, file string) {
	text, err := readLimited(file)
	var failed *fs.PathError
	if errors.As(err, &failed) {
		err = failed.Err // without the name, which the sentence has already
	}
	if err != nil {
		p.add("--config %q cannot be read: %w", file, err)
		return
	}
	p.applyConfig(f, file, text)
}

func readLimited(file string) ([]byte, error) {
	r, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	text, err := io.ReadAll(io.LimitReader(r, maxConfigFile+1))
	if err == nil && len(text) > maxConfigFile {
		err = fmt.Errorf("it is longer than %d octets", maxConfigFile)
	}
	return text, err
}

// applyConfig is readConfig for what stood in the file.
func (p *problems) applyConfig(f *pflag.FlagSet, file string, text []byte) {
	values, keys, err := decodeConfig(text)
	var bad *toml.DecodeError
	if errors.As(err, &bad) {
		line, column := bad.Position()
		p.add("%s:%d:%d: this is not TOML: %s", file, line, column, oneLine(strings.TrimPrefix(bad.Error(), "toml: ")))
		return
	}
	if err != nil {
		p.add("%s: this is not TOML: %s", file, oneLine(err.Error()))
		return
	}
	known := len(p.errs)
	words := make(map[string][]string)
	origin := make(map[string]string)
	var pools, inPool []int // the lines of [[pool]], and of [pool.x] and the like
	for _, key := range keys {
		at := fmt.Sprintf("%s:%d", file, key.line)
		flag := f.Lookup(key.name)
		switch {
		case isPool(key.name):
			if key.nested {
				inPool = append(inPool, key.line)
			} else {
				pools = append(pools, key.line)
			}
		case slices.Contains(commandLineOnly, key.name):
			p.add("%s: %q may stand on the command line only", at, key.name)
		case flag == nil || key.nested:
			p.add("%s: unknown key %q%s", at, key.name, suggestion(f, key.name))
		default:
			if words[key.name], err = wordsOf(flag, values[key.name]); err != nil {
				p.add("%s: %s %w", at, key.name, err)
			}
			if !flag.Changed {
				origin[key.name] = at
			}
		}
	}
	if value, exists := values["pool"]; exists {
		if len(pools) == 0 {
			pools = inPool
		}
		p.readPools(file, text, value, pools)
	}
	if len(p.errs) > known {
		return
	}
	p.flags, p.origin, p.file = f, origin, file
	for name := range origin {
		for _, word := range words[name] {
			if err := f.Set(name, word); err != nil {
				p.add("--%s: %w", name, err)
			}
		}
	}
}

// configKey is a key of a configuration file.
type configKey struct {
	name   string // with a dot between the parts
	nested bool   // not at the top level
	line   int    // from 1
}

// decodeConfig returns the values of a file by their keys, and its keys in
// order.
func decodeConfig(text []byte) (map[string]any, []configKey, error) {
	var values map[string]any
	if err := toml.Unmarshal(text, &values); err != nil {
		return nil, nil, err
	}
	// To a struct without fields every key is one too many, and that error
	// has what is known of keys nowhere else: where they stand.
	d := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	err := d.Decode(new(struct{}))
	var unknown *toml.StrictMissingError
	if !errors.As(err, &unknown) {
		return values, nil, err
	}
	var keys []configKey
	for _, e := range unknown.Errors {
		line, _ := e.Position()
		path := e.Key()
		keys = append(keys, configKey{strings.Join(path, "."), len(path) != 1, line})
	}
	return values, keys, nil
}

// form is what the value of a key may be.
type form struct {
	text, integer, truth bool
	list                 bool   // or an array of those
	want                 string // the same in words
}

// formOf returns the form of a flag's key.
func formOf(flag *pflag.Flag) form {
	switch kind := flag.Value.Type(); {
	case kind == "bool":
		return form{truth: true, want: "true or false"}
	case kind == "int":
		return form{integer: true, want: "an integer"}
	case flag.Name == "mark":
		return form{integer: true, text: true, want: "an integer or a string"}
	case flag.Name == "reserve":
		return form{integer: true, text: true, list: true, want: "an integer, a string or an array of those"}
	case kind == "stringArray", flag.Name == "third-party":
		return form{text: true, list: true, want: "a string or an array of strings"}
	case strings.HasSuffix(flag.Name, "-lifetime"), flag.Name == "block-idle", flag.Name == "quarantine":
		return form{text: true, want: `a string such as "120s"`}
	default:
		return form{text: true, want: "a string"}
	}
}

// wordsOf returns the arguments that the flag would have on a command line
// that says the same as a value of the file.
func wordsOf(flag *pflag.Flag, value any) ([]string, error) {
	form := formOf(flag)
	list, isList := value.([]any)
	if !isList {
		list = []any{value}
	} else if !form.list {
		return nil, errors.New("must be " + form.want)
	}
	var words []string
	for _, v := range list {
		word, ok := "", false
		switch v := v.(type) {
		case string:
			word, ok = v, form.text
			if strings.ContainsFunc(v, unicode.IsControl) {
				return nil, fmt.Errorf("%q has a control character", v)
			}
		case int64:
			word, ok = strconv.FormatInt(v, 10), form.integer
			if flag.Name == "mark" {
				word = fmt.Sprintf("%#x", v) // as people write marks
			}
		case bool:
			word, ok = strconv.FormatBool(v), form.truth
		}
		if !ok {
			return nil, errors.New("must be " + form.want)
		}
		words = append(words, word)
	}
	if isList && flag.Value.Type() != "stringArray" { // not repeatable: PREFIX,...
		if len(words) == 0 {
			return nil, errors.New(`is empty; say "off" if nobody is meant`)
		}
		words = []string{strings.Join(words, ",")}
	}
	return words, nil
}

// suggestion returns the end of a sentence about an unknown key: the flag that
// was meant, if one is near.
func suggestion(f *pflag.FlagSet, name string) string {
	meant, least := "", min(2, len(name)/2)+1
	plain := strings.ReplaceAll(strings.ToLower(name), "_", "-")
	f.VisitAll(func(flag *pflag.Flag) {
		if slices.Contains(commandLineOnly, flag.Name) || max(len(plain), len(flag.Name))-min(len(plain), len(flag.Name)) >= least {
			return
		}
		if n := distance(plain, flag.Name); n < least {
			meant, least = flag.Name, n
		}
	})
	if meant == "" {
		return "; the keys are the names of the flags that pcpd --help tells"
	}
	return fmt.Sprintf("; did you mean %q?", meant)
}

// distance returns how many octets must be put in, left out or changed to make
// b of a.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			changed := diagonal
			if a[i] != b[j] {
				changed++
			}
			diagonal = row[j+1]
			row[j+1] = min(changed, diagonal+1, row[j]+1)
		}
	}
	return row[len(b)]
}

// oneLine makes one line of what quotes a file.
func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// flagInFormat finds the flags in the format of a sentence: --name, or --%s
// with the name as the first argument.
var flagInFormat = regexp.MustCompile(`--(?:%s|[a-z][a-z-]*)`)

// located rewrites the format of a sentence that begins with the flag it is
// about. If that stands in the configuration file, the sentence is to begin
// with the place and name the key; another flag that stands there is named as
// a key, with its place at the end.
func (p *problems) located(format string, args []any) string {
	if len(p.origin) == 0 {
		return format
	}
	about, end := "", ""
	for i, flag := range flagInFormat.FindAllString(format, -1) {
		name := strings.TrimPrefix(flag, "--")
		if name == "%s" {
			name = fmt.Sprint(args[0])
		}
		if i == 0 {
			about = name
		}
		at, typed := p.origin[name], p.flags.Changed(name)
		if at != "" && name != about && !strings.Contains(end, name+" is in ") {
			end += fmt.Sprintf(" (%s is in %s)", name, escaped(at))
		}
		if at != "" || !typed && p.origin[about] != "" {
			format = strings.Replace(format, flag, flag[len("--"):], 1)
		}
	}
	if at := p.origin[about]; at != "" {
		format = escaped(at) + ": " + format
	}
	return format + end
}

// escaped makes of a text the format that writes it.
func escaped(s string) string { return strings.ReplaceAll(s, "%", "%%") }

// isPool reports whether a key is pool or inside one. They are read by
// readPools.
func isPool(name string) bool { return name == "pool" || strings.HasPrefix(name, "pool.") }
